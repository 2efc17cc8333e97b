"""What a user is told where a run ends because memory is short."""

from __future__ import annotations

import torch


def describe_shortage(error: BaseException | None) -> str | None:
    """Return what to change where an error means that memory is short, else None."""
    is_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if not is_host and not isinstance(error, torch.OutOfMemoryError):
        return None
    where = "host memory" if is_host else "GPU memory"
    return (
        f"Out of {where}. Lower per_device_train_batch_size (global_batch_size keeps the step's "
        "size), set gradient_checkpointing=true, or choose a smaller model. Steps since the last "
        "checkpoint are lost; go on with --resume latest."
    )
