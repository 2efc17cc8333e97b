"""What `metadata.json` says of a checkpoint: written once, at the save.

train state -> metadata.json -> viewer, upload manager, monitor
"""

from __future__ import annotations

import functools
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

import torch

from configs.training_config import PROJECT_DIRECTORY, TrainingConfig
from utils.base.text import perplexity
from utils.checkpoints.layout import RunIdentity
from utils.data.data_state import DataState
from utils.tracking.metrics_log import HISTORY_LIMIT, loss_trend
from utils.training_utils import TrainState, device_name


def build_metadata(
    state: TrainState, data_state: DataState, config: TrainingConfig, identity: RunIdentity
) -> dict[str, Any]:
    """Return what `metadata.json` says of the state as it is."""
    progress = state.progress
    losses = progress.history["loss_history"]
    recent = losses[-HISTORY_LIMIT:]
    best = progress.best_validation_loss
    # A save on request does not evaluate: an older loss is not that of this state.
    is_measured = progress.validation_step == progress.step
    validation_loss = progress.validation_loss if is_measured else None
    rate = (progress.history["tokens_per_second"] or [None])[-1]
    return {
        "step": progress.step,
        "epoch": data_state.epoch,
        "current_loss": losses[-1] if losses else None,
        "best_loss": progress.best_loss,
        "loss_history": recent,
        "learning_rates": progress.history["learning_rates"][-HISTORY_LIMIT:],
        "validation_metrics": {
            "current_avg_loss": losses[-1] if losses else None,
            "steps_since_best": progress.step - progress.best_loss_step,
            "loss_trend": loss_trend([loss for loss in recent if loss is not None]),
            "validation_loss": validation_loss,
            "perplexity": _perplexity(validation_loss),
            "best_validation_loss": best,
        },
        "training_progress": {
            "completed_steps": progress.step,
            "total_epochs": data_state.epoch,
            "files_processed": data_state.files_consumed,
            "max_steps": config.max_steps,
            "tokens_seen": progress.tokens_seen,
            "samples_seen": progress.sample_index,
            "global_batch_size": progress.global_batch_size,
            "tokens_per_second": rate,
            "mfu": state.utilization(config.sequence_length).at(rate),
        },
        "bad_steps": list(progress.bad_steps),
        "spending": progress.spending,
        "system_info": system_info(state),
        "timestamp": datetime.now(UTC).isoformat(),
        "run_id": identity.run_id,
        "git_commit": git_commit(),
    }


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else perplexity(loss)


def system_info(state: TrainState) -> dict[str, Any]:
    """Return the machine and the versions, for `metadata.json`."""
    import accelerate
    import transformers

    device = state.accelerator.device
    return {
        "cuda_available": torch.cuda.is_available(),
        "device_count": torch.cuda.device_count(),
        "mixed_precision": state.accelerator.mixed_precision,
        "device": device_name(device),
        "world_size": state.accelerator.num_processes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "num_parameters": sum(p.numel() for p in state.core_model.parameters()),
    }


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this project's checkout, None where there is none."""
    try:
        result = subprocess.run(  # noqa: S603
            ["git", "-C", str(PROJECT_DIRECTORY), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
