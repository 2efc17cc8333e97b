"""How a process starts: its libraries loaded once and quickly, the memory it frees kept.

torch, transformers and accelerate make hundreds of thousands of objects while they are imported,
nearly all of which stay for good. Python's garbage collector would look through all of them again
and again in search of garbage: up to a quarter of the imports' time (BENCHMARKS.md, "Startup").

A training step on a CPU makes its activations and gradients anew. The C library gives large blocks
back to the system as soon as they are freed, and trims its heap, so that each step would get
fresh pages: a fault and a page of zeros for every 4 KiB (BENCHMARKS.md, "Memory of a step").
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.base.errors import ConfigError

# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK_BYTES = 2**30
KEPT_FREE_BYTES = 2**31 - 1
COMPILED_FOLDER = "torch_compile"


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage within, and never look at what is there at the end.

    Use it around imports only: what is a garbage cycle by then is never freed. Later collections,
    and the end of the process, are quicker too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def load_libraries() -> None:
    """Import what every training run needs; nothing to do where that has been done.

    transformers loads its parts when they are asked for, so three names stand for the rest.
    """
    if "torch" in sys.modules:  # what else is there by now may well become garbage
        return
    # What torch itself sets when it is loaded: Ctrl-C before that would end with statistics of it.
    logging.getLogger("torch").setLevel(logging.WARNING)
    with no_collections():
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401


def keep_freed_memory() -> None:
    """Have blocks up to 1 GiB reused instead of given back, and up to 2 GiB kept free for that.

    Nothing is changed where the C library is not GNU's.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_FREE_BYTES)


def keep_compiled(cache: Path) -> None:
    """Have torch.compile keep its results in a cache, where the user has not said otherwise.

    Call it before transformers is loaded, which chooses a folder of its own.

    Raises:
        ConfigError: The folder cannot be made.
    """
    folder = str(cache.resolve() / COMPILED_FOLDER)
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"torch.compile cannot keep its results in {folder}: {exc.strerror}. Set cache_dir "
            "elsewhere, or torch_compile=false."
        ) from exc
