"""Talk between the ranks of a run; every function also works where there is only one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from utils.errors import PretrainError

T = TypeVar("T")


def is_main_rank() -> bool:
    """Tell whether this is rank 0, also before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def launched_world_size() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def are_ranks_connected() -> bool:
    """Tell whether there are several ranks that have met."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def compute_on_main(compute: Callable[[], T]) -> T:
    """Return rank 0's result on every rank.

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
    torch.distributed.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise SystemExit(outcome[1])
    result: T = outcome[0]
    return result


def gather_to_main(value: T) -> list[T] | None:
    """Return every rank's value on rank 0, None on the others."""
    if not are_ranks_connected():
        return [value]
    gathered: list[Any] | None = None
    if is_main_rank():
        gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(value, gathered, dst=0)
    return gathered
