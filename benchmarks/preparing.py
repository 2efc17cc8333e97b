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

from benchmarks.figures import interleave, prepare_sample, ratios, spread, timed
from configs.config_files import PROJECT_DIRECTORY

PREPARE = (sys.executable, str(PROJECT_DIRECTORY / "scripts" / "prepare_data.py"))
MEGABYTE = 10**6
ENCODED_MB, TASKS_MB = 24, 80
MEMORY_MB = (50, 200)


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
    """Compare two tasks at once with one task, a core for the tokenizing of each."""
    text, outputs = write_lines(folder / "tasks.jsonl", TASKS_MB * MEGABYTE), count()

    def run(num_tasks: int) -> float:
        output = folder / f"tasks-{next(outputs)}"
        words = ["--input", text, "--tokenizer", tokenizer, "--output", output]
        words += ["--tasks", num_tasks, "--quiet"]
        _wait([_start([*words, "--task", "tokenizer"])])
        begin = time.perf_counter()
        _wait([_start([*words, "--task", number]) for number in range(num_tasks)])
        return time.perf_counter() - begin

    seconds = interleave({"one": partial(run, 1), "two": partial(run, 2)}, runs, warm_up=False)
    return {
        f"one task, {TASKS_MB} MB": spread(seconds["one"], " s"),
        "two tasks at once": spread(seconds["two"], " s"),
        "times as fast as one": spread(ratios(seconds["one"], seconds["two"]), "x"),
    }


def measure_memory(folder: Path, tokenizer: Path) -> dict[str, str]:
    """Return the peak of host memory by the size of the text."""
    found = {}
    for size in MEMORY_MB:
        text, output = write_lines(folder / f"{size}.jsonl", size * MEGABYTE), folder / f"{size}"
        process = _start(["--input", text, "--tokenizer", tokenizer, "--output", output, "--quiet"])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        _wait([process])
        found[f"peak host memory, {size} MB"] = f"{used.ru_maxrss / 1024:.0f} MiB"
    return found


def _start(words: Sequence[object]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603
        [*PREPARE, *map(str, words), "--token-cache", "off"],
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.wait():
            raise RuntimeError(f"prepare_data.py ended with {process.returncode}")
