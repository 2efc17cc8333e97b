"""The memory of this process: what is freed is kept for the next step.

A training step on a CPU makes its activations and gradients anew. The C library gives large blocks
back to the system as soon as they are freed, and trims its heap, so that each step would get
fresh pages: a fault and a page of zeros for every 4 KiB (BENCHMARKS.md, "Memory of a step").
"""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK_BYTES = 2**30
KEPT_FREE_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have blocks up to 1 GiB reused instead of given back, and up to 2 GiB kept free for that.

    Returns:
        False where the C library is not GNU's, and nothing was changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    set_option = library.mallopt
    return bool(set_option(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)) and bool(
        set_option(M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
    )
