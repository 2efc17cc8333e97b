"""Talk between the ranks of a run; every function also works where there is only one.

Values go through host memory: a group of its own over gloo, which costs no wait for the device and
no device memory. Its timeout is long, so that a rank may wait for another one's save or download.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from utils.base.errors import PretrainError

HOST_TIMEOUT = timedelta(hours=24)

T = TypeVar("T")

_host_groups: dict[Any, Any] = {}  # the group of all ranks -> its host group


def is_main_rank() -> bool:
    """Tell whether this is rank 0, also before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def launched_world_size() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_on_this_machine() -> int:
    """Return how many of them the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def are_ranks_connected() -> bool:
    """Tell whether there are several ranks that have met."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def connect_host_group() -> None:
    """Create the host group where there is none yet; all ranks call this at the same point."""
    if are_ranks_connected() and host_group() is None:
        group = new_host_group()
        _host_groups.clear()  # those of ranks that have disconnected since
        _host_groups[torch.distributed.group.WORLD] = group


def disconnect() -> None:
    """Destroy all groups of the ranks; nothing is exchanged after this.

    Their threads end here. One that still runs while the interpreter shuts down aborts the process,
    and a run that succeeded would end with the exit code of a failure.
    """
    _host_groups.clear()
    if are_ranks_connected():
        torch.distributed.destroy_process_group()


def host_group() -> Any | None:
    """Return the group whose collectives stay in host memory; None before it is connected."""
    return _host_groups.get(torch.distributed.group.WORLD) if are_ranks_connected() else None


def any_rank(wish: bool) -> bool:
    """Tell whether any rank wishes so; all ranks call this at the same point.

    It needs the host group where the ranks talk over NCCL.
    """
    if not are_ranks_connected():
        return wish
    flag = torch.tensor([int(wish)])
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=host_group())
    return bool(flag.item())


def compute_on_main(compute: Callable[[], T]) -> T:
    """Return rank 0's result on every rank; all ranks call this at the same point.

    Raises:
        PretrainError: What rank 0 raised.
        SystemExit: On the other ranks, with its exit code; rank 0 alone tells the user.
    """
    if not are_ranks_connected():
        return compute()
    outcome: list[Any] = [None, None]
    error: PretrainError | None = None
    if is_main_rank():
        try:
            outcome[0] = compute()
        except PretrainError as exc:
            error, outcome[1] = exc, int(exc.exit_code)
    torch.distributed.broadcast_object_list(outcome, src=0, group=host_group())
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise SystemExit(outcome[1])
    result: T = outcome[0]
    return result


def broadcast_from_main(value: T) -> T:
    """Return rank 0's value on every rank; all ranks call this at the same point."""
    return compute_on_main(lambda: value)


def gather_to_main(value: T, group: Any | None = None) -> list[T] | None:
    """Return every rank's value on rank 0, None on the others; all ranks call this.

    `group` is what `new_host_group` returned, for calls from another thread.
    """
    if not are_ranks_connected():
        return [value]
    gathered: list[Any] | None = None
    if is_main_rank():
        gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(value, gathered, dst=0, group=group or host_group())
    return gathered


def new_host_group() -> Any | None:
    """Return another group like the host group, for a thread of its own; all ranks call this."""
    if not are_ranks_connected():
        return None
    return torch.distributed.new_group(backend="gloo", timeout=HOST_TIMEOUT)
