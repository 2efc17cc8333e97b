"""A campaign of preparations in tasks: hundreds of kills; no document lost, none twice.

    round: N tasks, two at a time --> SIGKILL at any instant --> again, ..., all done --> merge

Each task is a process that runs prepare_data.py, started again until it ends by itself; now and
then two processes do the same task at once, and a merge comes too early. A round's output is
compared with what a preparation without kills gives:

    lost        a document that is not in the shards of the index
    doubled     one that is there more often than in the sources
    different   a file of other bytes than without kills, or one that was left behind
    early       an index.json before all parts were there
    failed      a process that ended as it must not

Exit code 0 means none of these. It needs what the tests need (`make setup`), on Linux.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts import prepare_data
from tests.campaigns.findings import CampaignResults, build_parser, conclude
from tests.sample_shards import read_files, read_texts
from utils.base.console import configure_logging, run_command
from utils.base.errors import ExitCode
from utils.tools.proofs.started_runs import open_work_folder

DOCUMENTS = 3_000
SHARD_TOKENS = 4_000
TASK_COUNTS = (1, 2, 3, 5, 8)
QUICK_CYCLES = 12
TWICE_SHARE, EARLY_SHARE = 0.1, 0.1
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.campaigns.soak_tasks", "utils.corpus.tasks.tasks"])


def run_quietly(words: Sequence[str], scratch: Path) -> None:
    """Run prepare_data.py in this process and end with its exit code."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    tempfile.tempdir = str(scratch)
    sys.exit(prepare_data.main([*words, "--quiet"]))


def write_sources(folder: Path, seed: int) -> Counter[str]:
    """Write JSON lines and text; return the documents."""
    folder.mkdir()
    generator = random.Random(seed)
    texts = [
        f"{number} " + "one two three " * generator.randint(1, 40) for number in range(DOCUMENTS)
    ]
    half = DOCUMENTS // 2
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:half])
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt").write_text("<|end|>".join(text.strip() for text in texts[half:]))
    return Counter([*texts[:half], *(text.strip() for text in texts[half:])])


@dataclass
class Results(CampaignResults):
    """What a campaign has found, how often it killed, and how long it took."""

    kills: int = 0
    rounds: int = 0
    seconds: float = 0.0


class Campaign:
    """Rounds of preparations in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.results = Results(seed)
        self._folder, self._random, self._num_kills = folder, random.Random(seed), 0
        (folder / "scratch").mkdir()
        self._texts = write_sources(folder / "texts", seed)
        self._undisturbed: dict[int, tuple[dict[str, bytes], float]] = {}

    def run(self, num_kills: int) -> None:
        """Run rounds until so many processes were killed; the last one goes on without kills."""
        start = time.monotonic()
        self._num_kills = num_kills
        while self.results.kills < num_kills:
            self._run_round(self._random.choice(TASK_COUNTS))
            self.results.rounds += 1
        self.results.seconds = round(time.monotonic() - start, 1)

    def _run_round(self, count: int) -> None:
        expected, seconds = self._find_expected(count)
        output = self._folder / f"round-{self.results.rounds}"
        left: list[str] = ["tokenizer"]
        later = list(map(str, range(count)))
        while left:
            tasks = left[:2]
            if len(tasks) == 1 and self._random.random() < TWICE_SHARE:
                tasks *= 2
            done = self._run_and_kill(output, count, tasks, seconds)
            left = [task for task in left if task not in done]
            if not left and later:
                left, later = later, []
                self._random.shuffle(left)
            elif self._random.random() < EARLY_SHARE and left != ["tokenizer"]:
                self._merge_early(output, done_all=not left)
            self._random.shuffle(left)
        self._expect(["merge", str(output)], ExitCode.DONE)
        self._compare(output, expected)

    def _words(self, output: Path, count: int, task: str) -> list[str]:
        return [
            *("--input", str(self._folder / "texts"), "--document-separator", "<|end|>"),
            *("--vocab-size", "300", "--shard-tokens", str(SHARD_TOKENS)),
            *("--output", str(output), "--tasks", str(count), "--task", task),
        ]

    def _find_expected(self, count: int) -> tuple[dict[str, bytes], float]:
        """Return the files of a preparation without kills, and how long a task takes."""
        if count not in self._undisturbed:
            output, start = self._folder / f"undisturbed-{count}", time.monotonic()
            for task in ("tokenizer", *map(str, range(count))):
                self._expect(self._words(output, count, task), ExitCode.DONE)
            seconds = (time.monotonic() - start) / (count + 1)
            self._expect(["merge", str(output)], ExitCode.DONE)
            self._undisturbed[count] = read_files(output), seconds
        return self._undisturbed[count]

    def _run_and_kill(
        self, output: Path, count: int, tasks: Sequence[str], seconds: float
    ) -> set[str]:
        """Run tasks at once and kill each at some instant; return those that ended before."""
        running = []
        for task in tasks:
            process = self._start(self._words(output, count, task))
            running.append((task, process, time.monotonic() + self._random.uniform(0, seconds)))
        done = set()
        for task, process, end in sorted(running, key=lambda one: one[2]):
            is_spared = self.results.kills >= self._num_kills
            process.join(None if is_spared else max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
            process.join()
            if process.exitcode == ExitCode.DONE:
                done.add(task)
            elif process.exitcode is not None and process.exitcode < 0:
                self.results.kills += 1
            else:
                self._note("failed", f"task {task} of {count} ended with {process.exitcode}")
                done.add(task)
        return done

    def _start(self, words: Sequence[str]) -> Any:
        process = FORKS.Process(target=run_quietly, args=(words, self._folder / "scratch"))
        process.start()
        return process

    def _merge_early(self, output: Path, done_all: bool) -> None:
        if not done_all:
            self._expect(["merge", str(output)], ExitCode.USAGE)
            if (output / "index.json").exists():
                self._note("early", f"{output.name} has an index before all parts are there")

    def _expect(self, words: Sequence[str], code: int) -> None:
        process = self._start(words)
        process.join()
        if process.exitcode != code:
            self._note("failed", f"{' '.join(words)} ended with {process.exitcode}, not {code}")

    def _compare(self, output: Path, expected: dict[str, bytes]) -> None:
        found = Counter(itertools.chain.from_iterable(read_texts(output).values()))
        files = read_files(output)
        for kind, documents in (("lost", self._texts - found), ("doubled", found - self._texts)):
            for text in documents:
                self._note(kind, f"{output.name}: {text[:40]!r}")
        for name in sorted(files.keys() | expected.keys()):
            if files.get(name) != expected.get(name):
                self._note("different", f"{output.name}: {name}")

    def _note(self, kind: str, text: str) -> None:
        self.results.add(kind, self.results.kills, text)


def run(arguments: argparse.Namespace) -> ExitCode:
    """Run the campaign that the command line describes."""
    configure_logging("error", quiet=False, stderr=True)
    with open_work_folder(arguments) as folder:
        campaign = Campaign(folder, arguments.seed)
        campaign.run(QUICK_CYCLES if arguments.quick else arguments.cycles)
        results = campaign.results
        arguments.keep = arguments.keep or bool(results.findings)
    print(f"{results.kills} kills in {results.rounds} rounds, {results.seconds} s.")
    return conclude(results, arguments.json, after="kill")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; return the exit code."""
    parser = build_parser("soak_tasks.py", __doc__, f"{QUICK_CYCLES} kills")
    parser.add_argument("--cycles", type=int, default=200, metavar="N", help="kills (default: 200)")
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
