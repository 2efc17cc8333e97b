"""From `python train.py` to the end of the first step, against what cannot be had for less.

The peer is a script of nothing but `from transformers import GPTNeoXForCausalLM`, the same model
and one step of the same size. Both are processes of their own, as a user starts them, in turns;
each is ended once its step is done. The aim is about the import and the step alone, so the peer's
time to build the model is left out there.

A third process tells where the seconds of ours go:

    python -m benchmarks.startup FOLDER WORDS...
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.figures import TRAIN, prepare_sample, ratios, run_module, spread
from benchmarks.loop_parts import Clocks
from configs.training_config import TrainingConfig, get_training_config

if TYPE_CHECKING:
    from utils.run.run import TrainingRun

STEP_LINE = "Step 1/"

PLAIN = """
import json, sys
from transformers import GPTNeoXForCausalLM
print("imported", flush=True)
import torch
from transformers import GPTNeoXConfig
settings = json.loads(sys.argv[1])
model = GPTNeoXForCausalLM(GPTNeoXConfig.from_json_file(settings["model"])).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
print("built", flush=True)
for _ in range(settings["micro_steps"]):
    batch = torch.randint(model.config.vocab_size, settings["shape"])
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss / settings["micro_steps"]
    loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("stepped", flush=True)
"""


Milestones = dict[str, tuple[float, float]]
"""Line that a process printed -> (wall seconds since its launch, its CPU seconds)."""


def measure_startup(folder: Path, runs: int) -> dict[str, str]:
    """Measure the start of the test configuration, with data and caches in place."""
    # A user's Python keeps the bytecode that it has compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    data = prepare_sample(folder)
    words = ["--config", "test", "--set", f"data_uri={data}", "--set", "logging_steps=1"]
    settings = _describe_peer(folder)
    measured = []
    for number in range(runs + 1):
        work = folder / f"run-{number}"
        work.mkdir()
        peer = [sys.executable, "-c", PLAIN, settings]
        measured.append(
            (
                _watch(work, [*TRAIN, *words], [STEP_LINE]),
                _watch(work, peer, ["imported", "built", "stepped"]),
                run_module("startup", str(work / "phases"), *words, "--quiet"),
            )
        )
    # The first is a warm-up: it also writes bytecode.
    ours, peers, phases = zip(*measured[1:], strict=True)
    return {**_compare(ours, peers), **_describe_phases(phases)}


def _describe_peer(folder: Path) -> str:
    """Return the settings of the peer: the model and the micro-batches of a step."""
    from configs.model_config import build_model_config

    config = get_training_config("test")
    path = folder / "model.json"
    model = build_model_config(config.model, config.model_overrides, config.sequence_length)
    path.write_text(json.dumps(model.to_dict()), "utf-8")
    _, accumulation = config.resolve_batch(1)
    shape = [config.per_device_train_batch_size, config.sequence_length]
    return json.dumps({"model": str(path), "micro_steps": accumulation, "shape": shape})


def _watch(folder: Path, words: Sequence[str], awaited: Sequence[str]) -> Milestones:
    """Start a process in a folder; return when each awaited text was told, then end it."""
    began = time.perf_counter()
    told, left, found = [], list(awaited), {}
    with subprocess.Popen(  # noqa: S603
        words,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            if left[0] in line:
                times = psutil.Process(process.pid).cpu_times()
                seconds = time.perf_counter() - began
                found[left.pop(0)] = seconds, times.user + times.system
                if not left:
                    process.kill()
                    return found
    raise RuntimeError(f"no {left[0]!r} in: {''.join(told)}")


def _compare(ours: Sequence[Milestones], peers: Sequence[Milestones]) -> dict[str, str]:
    """Return the time of ours and its ratio to the peer's, as wall time and as CPU time."""
    figures: dict[str, str] = {}
    for place, name in enumerate(("wall", "cpu")):
        own = [found[STEP_LINE][place] for found in ours]
        times = [{text: when[place] for text, when in found.items()} for found in peers]
        imports = [found["imported"] for found in times]
        wholes = [found["stepped"] for found in times]
        aims = [found["imported"] + found["stepped"] - found["built"] for found in times]
        figures |= {
            f"python train.py to the end of step 1, {name}": spread(own, " s"),
            f"import of the model class, {name}": spread(imports, " s"),
            f"import and one step, {name}": spread(aims, " s"),
            f"ratio to import and one step, {name}": spread(ratios(own, aims)),
            f"ratio to import, model and one step, {name}": spread(ratios(own, wholes)),
        }
    return figures


def _describe_phases(runs: Sequence[dict[str, float]]) -> dict[str, str]:
    """Return what each phase takes, and its share of the whole."""
    whole = statistics.median(sum(phases.values()) for phases in runs)
    figures = {}
    for name in runs[0]:
        seconds = [phases[name] for phases in runs]
        share = statistics.median(seconds) / whole
        figures[f"where: {name}"] = f"{spread(seconds, ' s')}, {share:.0%}"
    return figures


def main(folder: str, *words: str) -> int:
    """Print the phases of train.py in a new folder as JSON, up to the end of its first step."""
    clocks = Clocks()
    interpreter = max(0.0, time.time() - psutil.Process().create_time())
    Path(folder).mkdir()
    os.chdir(folder)
    import train
    from utils.base import startup

    clocks.wrap(startup, "load_libraries", "torch, transformers, accelerate")
    start = train.start

    def start_timed(*args: Any, **kwargs: Any) -> int:
        from utils import training_utils
        from utils.run.run import TrainingRun
        from utils.start import preflight

        clocks.wrap(preflight, "check_start", "preflight")
        clocks.wrap(training_utils, "build_train_state", "model and optimizer")
        clocks.wrap(TrainingRun, "__enter__", "trackers, snapshots")
        clocks.wrap(TrainingRun, "train_step", "the first step")
        return start(*args, **kwargs)

    def step_once(run: TrainingRun, config: TrainingConfig, stop_after: int | None) -> int:
        for batches in run.batches(1):
            run.train_step(batches)
        clocks.end_step()
        (phases,) = clocks.steps
        whole = phases.pop("whole step")
        phases["all the rest"] = whole - sum(phases.values())
        print(json.dumps({"the interpreter": interpreter, **phases}), flush=True)
        os._exit(0)

    train.start, train.loop = start_timed, step_once
    return train.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
