"""The preparation of text: tokenizing, two tasks at once, host memory.

The text is the sample's, again and again in another order, as JSON lines; the tokenizer is trained
on it. The peers of the tokenizing are two ways in which `tokenizers` itself makes ids of all texts.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.figures import PREPARE, interleave, prepare_sample, ratios, spread, timed

NO_CACHE = ("--token-cache", "off")
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
MEGABYTE = 10**6
ENCODED_MB, TASKS_MB = 24, 80
MEMORY_MB, SHARD_TOKENS = (50, 200), 5_000_000


def measure_prepare(folder: Path, runs: int) -> dict[str, str]:
    """Measure the preparation of text."""
    tokenizer = prepare_sample(folder)
    return {
        **measure_tokenizing(tokenizer, runs),
        **measure_tasks(folder, tokenizer, runs),
        **measure_memory(folder, tokenizer),
    }


def make_texts(num_bytes: int) -> Iterator[str]:
    """Yield documents of the sample, shuffled anew each time round, up to a size."""
    from utils.corpus.text_sources.sample import SampleSource

    documents, left = list(SampleSource().documents()), num_bytes
    for number in count():
        random.Random(number).shuffle(documents)  # noqa: S311 - not a secret
        for document in documents:
            yield document
            left -= len(document.encode())
            if left <= 0:
                return


def write_lines(path: Path, num_bytes: int) -> Path:
    """Write documents as JSON lines; return the path."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in make_texts(num_bytes))
    return path


def measure_tokenizing(tokenizer: Path, runs: int) -> dict[str, str]:
    """Compare the ids of documents with those that `tokenizers` makes of a list, on all cores."""
    import numpy as np

    from utils.corpus.documents import TRAINING, Document
    from utils.corpus.tokenization import encode_documents, resolve_tokenizer

    resolved = resolve_tokenizer(str(tokenizer))
    backend, texts = resolved.build_backend(), list(make_texts(ENCODED_MB * MEGABYTE))

    def ours() -> list[Any]:
        documents = (Document(text, TRAINING) for text in texts)
        return [document.ids for document in encode_documents(resolved, documents)]

    def peer(encode: Callable[..., Any]) -> list[Any]:
        end = [resolved.eos_token_id]
        encodings = encode(texts, add_special_tokens=False)
        return [np.array(encoding.ids + end, resolved.dtype) for encoding in encodings]

    peers = {name: getattr(backend, name) for name in ("encode_batch", "encode_batch_fast")}
    for one, other in zip(ours(), peer(backend.encode_batch), strict=True):
        assert np.array_equal(one, other)
    ways = {"ours": partial(timed, ours)}
    ways |= {name: partial(timed, partial(peer, encode)) for name, encode in peers.items()}
    seconds = interleave(ways, runs)
    return {
        f"tokenizing {ENCODED_MB} MB": spread(seconds["ours"], " s"),
        **{
            f"times as fast as {name}": spread(ratios(seconds[name], seconds["ours"]), "x")
            for name in peers
        },
    }


def measure_tasks(folder: Path, tokenizer: Path, runs: int) -> dict[str, str]:
    """Compare two tasks at once with one task, each on a core of its own, as a scheduler has it.

    Once more on whichever core is free: a task reads text while it tokenizes what it read before,
    so that one task alone takes more than one core.
    """
    text, outputs = write_lines(folder / "tasks.jsonl", TASKS_MB * MEGABYTE), count()

    def run(num_tasks: int, *, is_pinned: bool) -> float:
        output = folder / f"tasks-{next(outputs)}"
        words = ["--input", text, "--tokenizer", tokenizer, "--output", output]
        words += ["--tasks", num_tasks, "--quiet"]
        _wait([_start([*words, "--task", "tokenizer"])])
        begin = time.perf_counter()
        cores = range(num_tasks)
        _wait([_start([*words, "--task", core], core if is_pinned else None) for core in cores])
        return time.perf_counter() - begin

    found = {}
    for where, is_pinned in (("a core each", True), ("any core", False)):
        ways = {f"{n} tasks": partial(run, n, is_pinned=is_pinned) for n in (1, 2)}
        one, two = interleave(ways, runs, warm_up=False).values()
        found[f"one task, {TASKS_MB} MB, {where}"] = spread(one, " s")
        found[f"two tasks at once, {where}"] = spread(two, " s")
        found[f"times as fast as one, {where}"] = spread(ratios(one, two), "x")
    return found


def measure_memory(folder: Path, tokenizer: Path) -> dict[str, str]:
    """Return the peak of host memory by the size of the text; a shard has 5 million tokens."""
    found = {}
    for size in MEMORY_MB:
        text, output = write_lines(folder / f"{size}.jsonl", size * MEGABYTE), folder / f"{size}"
        words = ["--input", text, "--tokenizer", tokenizer, "--output", output, "--quiet"]
        words += ["--shard-tokens", SHARD_TOKENS]
        # Of a process that is small itself: a child begins with the peak of what starts it.
        peak = subprocess.check_output(  # noqa: S603
            [sys.executable, "-c", PEAK, *PREPARE, *map(str, words), *NO_CACHE]
        )
        found[f"peak host memory, {size} MB"] = f"{int(peak) / 1024:.0f} MiB"
    return found


def _start(words: Sequence[object], core: int | None = None) -> subprocess.Popen[bytes]:
    """Start prepare_data.py with one thread that tokenizes; on one core alone where one is told."""
    everywhere = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {sorted(everywhere)[core]})
    try:
        return subprocess.Popen(  # noqa: S603
            [*PREPARE, *map(str, words), *NO_CACHE],
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
    finally:
        os.sched_setaffinity(0, everywhere)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.wait():
            raise RuntimeError(f"prepare_data.py ended with {process.returncode}")
