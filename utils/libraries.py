"""The large libraries, loaded once and quickly.

torch, transformers and accelerate make hundreds of thousands of objects while they are imported,
nearly all of which stay for good. Python's garbage collector would look through all of them again
and again in search of garbage: up to a quarter of the imports' time (BENCHMARKS.md, "Startup").
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


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
    with no_collections():
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401
