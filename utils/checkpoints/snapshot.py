"""The snapshot: a copy of the train state in host memory that another process can read.

    train state -> snapshot (host memory) -> checkpoint directory

All tensors go into one block that is made once and used again for every save, so host memory does
not grow. On Linux the block is an anonymous memory file (`memfd_create`), which does not count
against `/dev/shm`, 64 MB in most containers; where that cannot be had it is an unlinked file.
On a GPU the block is pinned and the copies run on a stream of their own beside the next forward and
backward pass; `fence` makes the device wait for them before the optimizer changes anything. On a
CPU the copy is done when `stage` returns.

torch.distributed.checkpoint's stagers keep one shared-memory file in `/dev/shm` for each tensor
storage and leave it to the caller when the copy may overlap; the rest of the idea is theirs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ALIGNMENT_BYTES = 64
WARM_BLOCK_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorSlot:
    """Stands for a tensor whose bytes lie in a block of host memory.

    They begin at `offset`, and are contiguous.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def map_leaves(tree: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """Return a copy of nested dicts, lists and tuples with each leaf of `kind` replaced."""
    if isinstance(tree, kind):
        return replace(tree)
    if isinstance(tree, dict):
        return type(tree)((key, map_leaves(value, kind, replace)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(map_leaves(value, kind, replace) for value in tree)
    return tree


class HostBlock:
    """One block of host memory, shared with a child process by its descriptor.

    The `descriptor` is that of an open file of at least `size` bytes, and is closed with the block.
    `kind` says what the file is: memory or file.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int, kind: str = "memory") -> None:
        self.descriptor, self.size, self.kind = descriptor, size, kind
        self._pinned_at: int | None = None
        self._tensors: dict[TensorSlot, torch.Tensor] = {}
        try:
            self._map = mmap.mmap(descriptor, size)
        except (OSError, ValueError):
            os.close(descriptor)
            raise
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._map.madvise(mmap.MADV_HUGEPAGE)

    @classmethod
    def allocate(cls, size: int, directory: Path | None = None) -> HostBlock:
        """Return a new block.

        It is a file in `directory` where one is given; None asks for memory first.

        Raises:
            OSError: Neither memory nor a file of this size can be had.
        """
        size = max(size, mmap.PAGESIZE)
        return cls(*_open_block(size, directory))

    def warm(self) -> None:
        """Touch every page, so that the first copy does not pay for it."""
        for start in range(0, self.size, WARM_BLOCK_BYTES):
            length = min(WARM_BLOCK_BYTES, self.size - start)
            self.tensor(TensorSlot(torch.uint8, (length,), start)).zero_()

    def pin(self) -> None:
        """Lock the pages for the GPU's copy engine; without that a copy is slower, not wrong."""
        address = self.tensor(TensorSlot(torch.uint8, (1,), 0)).data_ptr()
        status = _cuda_runtime().cudaHostRegister(address, self.size, 0)
        if int(status) == 0:
            self._pinned_at = address
        else:
            log.warning(
                "%d bytes of host memory cannot be pinned: copies for saves are slower.", self.size
            )

    def tensor(self, slot: TensorSlot) -> torch.Tensor:
        """Return the tensor of a slot, with a storage of its own over the block's bytes."""
        tensor = self._tensors.get(slot)
        if tensor is None:
            tensor = torch.empty(0, dtype=slot.dtype)
            if slot.count:
                tensor = torch.frombuffer(
                    self._map, dtype=slot.dtype, count=slot.count, offset=slot.offset
                )
            tensor = self._tensors[slot] = tensor.view(slot.shape)
        return tensor

    def close(self) -> None:
        """Give the memory back, or leave it to the last tensor that still uses it."""
        if self._pinned_at is not None:
            _cuda_runtime().cudaHostUnregister(self._pinned_at)
            self._pinned_at = None
        self._tensors.clear()
        with contextlib.suppress(BufferError):
            self._map.close()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _open_block(size: int, directory: Path | None) -> tuple[int, int, str]:
    """Return a descriptor, its bytes, and what they are: memory or file."""
    if directory is None and hasattr(os, "memfd_create"):
        try:
            descriptor = os.memfd_create("snapshot", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
        except OSError as exc:
            log.info("No shared memory of %d bytes (%s): using a file for snapshots.", size, exc)
        else:
            return descriptor, size, "memory"
    with tempfile.TemporaryFile(dir=directory) as file:
        # Reserved at once: a full disk is an error here, not a crash at the first write.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return os.dup(file.fileno()), size, "file"


def _place(tree: Any) -> tuple[Any, list[tuple[torch.Tensor, TensorSlot]], int]:
    """Return the tree with slots, each distinct tensor with its slot, and the bytes of all."""
    slots: dict[tuple[Any, ...], TensorSlot] = {}
    pairs: list[tuple[torch.Tensor, TensorSlot]] = []
    end = 0

    def place(tensor: torch.Tensor) -> TensorSlot:
        nonlocal end
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in slots:
            slots[key] = TensorSlot(tensor.dtype, tuple(tensor.shape), end)
            end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            pairs.append((tensor.detach(), slots[key]))
        return slots[key]

    return map_leaves(tree, torch.Tensor, place), pairs, end


class Snapshot:
    """Copies the tensors of a tree into a block and tells when they are there.

    The block holds one snapshot at a time.
    """

    def __init__(self, block: HostBlock, device: torch.device) -> None:
        self.block = block
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staged: Any = None
        self._kept: list[torch.Tensor] = []

    @staticmethod
    def size_of(tree: Any) -> int:
        """Return the bytes of a block that takes the tensors of `tree`."""
        return _place(tree)[2]

    def stage(self, tree: Any) -> Any:
        """Begin to copy; return the tree with a `TensorSlot` for each tensor.

        Tensors that share memory share a slot. The caller keeps the state unchanged until `fence`.

        Raises:
            ValueError: The block is too small.
        """
        slotted, pairs, size = _place(tree)
        if size > self.block.size:
            raise ValueError(f"a snapshot of {size} bytes does not fit into {self.block.size}")
        if self._stream is None:
            self._copy(pairs, non_blocking=False)
            return slotted
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._copy(pairs, non_blocking=True)
            self._staged = self._stream.record_event()
        self._kept = [tensor for tensor, _ in pairs]  # not freed while they are being read
        return slotted

    def _copy(self, pairs: list[tuple[torch.Tensor, TensorSlot]], *, non_blocking: bool) -> None:
        for tensor, slot in pairs:
            self.block.tensor(slot).copy_(tensor, non_blocking=non_blocking)

    def fence(self) -> None:
        """Let the device finish the copies before it does what is queued after this call."""
        staged = self._staged  # `wait` may be called in another thread
        if staged is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(staged)

    def wait(self) -> None:
        """Wait until all bytes are in the block."""
        staged = self._staged
        if staged is not None:
            staged.synchronize()
            self._staged, self._kept = None, []
