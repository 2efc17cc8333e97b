"""Saving: how long training waits, its steps meanwhile, a run with saves against one without."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import (
    GPU_SHAPE,
    anonymous_bytes,
    build_setup,
    interleave,
    ratios,
    spread,
    timed,
)
from utils.storage.bucket import fsync_directory

# 70M parameters.
CPU_SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 50257,
}


def measure_checkpoint(folder: Path, runs: int) -> dict[str, str]:
    """Measure saving: a GPT-NeoX of 70M parameters on a CPU, the 1.2B one on a GPU."""
    bench = SavingBench(folder, CPU_SHAPE)
    try:
        return {**bench.measure_blocking(runs), **bench.measure_steps(runs), **bench.measure_run(3)}
    finally:
        bench.saver.close()


class SavingBench:
    """A train state with its saver, as a run builds them; `shape` is the model's on a CPU."""

    def __init__(self, folder: Path, shape: dict[str, int]) -> None:
        import torch

        from utils.base.machine import available_memory
        from utils.checkpoints.saver import CheckpointSaver

        self.folder = folder
        settings: dict[str, Any] = {"global_batch_size": 1, "sequence_length": 128}
        settings |= {f"model_overrides.{key}": value for key, value in shape.items()}
        if torch.cuda.is_available():
            settings = GPU_SHAPE
        self.setup = build_setup(folder, {**settings, "max_steps": 10**6})
        self.state, self.batches = self.setup.state, self.setup.random_batches()
        device = self.setup.accelerator.device
        self.saver = CheckpointSaver(folder / "ours", device, lambda checkpoint: None)
        self.step()
        self.saver.prepare(self.state.division.snapshot_bytes(), available_memory())
        while self.saver._writer is not None and not self.saver._writer.is_ready():
            time.sleep(0.1)

    def step(self) -> float:
        """Do one step; return its seconds."""
        from utils.training_utils import train_step

        begin = time.perf_counter()
        train_step(self.state, self.batches, 1.0, None, self.saver.fence)
        self.setup.synchronize()
        return time.perf_counter() - begin

    def save(self) -> float:
        """Begin to save as a run does; return the seconds that training waits."""
        from utils.base.machine import available_memory
        from utils.checkpoint_utils import add_held_state, capture_random_state, collect_files
        from utils.checkpoints.layout import RunIdentity
        from utils.data.data_state import DataState

        self.state.progress.step += 1
        begin = time.perf_counter()
        position = DataState(0, 0, 0, 128, 0, 1, ())
        told = (position, self.setup.config, RunIdentity("20260101-0a1b2c3d"))
        rest = collect_files(self.state, *told, [capture_random_state()], {})
        files = add_held_state(self.state, *told, rest)
        assert files is not None
        self.saver.save(files, available_memory())
        return time.perf_counter() - begin

    def finish_save(self) -> float:
        """Wait for the commit and remove what was written; return the seconds it all took."""
        self.saver.wait()
        if self.saver.failure is not None:
            raise self.saver.failure
        shutil.rmtree(self.folder / "ours")
        (self.folder / "ours").mkdir()
        return self.saver.last_seconds or 0.0

    def save_by_accelerate(self) -> float:
        """Return the seconds of Accelerator.save_state of the same state."""
        target = self.folder / "accelerate"
        seconds = timed(lambda: self.setup.accelerator.save_state(str(target)))
        shutil.rmtree(target)
        return seconds

    def save_durably_by_accelerate(self, number: int) -> None:
        """Save by Accelerator.save_state; return when all of it is on the disk, as ours is."""
        target = self.folder / "accelerate" / str(number)
        self.setup.accelerator.save_state(str(target))
        for path in (*target.rglob("*"), target, target.parent):
            fsync_directory(path)

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of this process and of the one that writes for it."""
        writer = self.saver._writer
        processes = [os.getpid(), *([writer.pid] if writer else [])]
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in processes)

    def save_by_dcp(self) -> float:
        """Return the seconds until torch's async_save of the same state returns."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        state = {
            "model": self.state.core_model.state_dict(),
            "optimizer": self.state.optimizer.state_dict()["state"],
        }
        begin = time.perf_counter()
        saving: Any = async_save(state, checkpoint_id=str(self.folder / "dcp"))
        seconds = time.perf_counter() - begin
        saving.result()
        shutil.rmtree(self.folder / "dcp")
        return seconds

    def measure_blocking(self, runs: int) -> dict[str, str]:
        """Compare how long training waits for a save; ours and the peers take turns."""
        import torch.distributed

        commits = []

        def save() -> float:
            seconds = self.save()
            commits.append(self.finish_save())
            return seconds

        def after_a_step(way: Callable[[], float]) -> Callable[[], float]:
            def measure() -> float:
                os.sync()  # what the one before wrote is no burden to this one
                self.step()
                return way()

            return measure

        ways = {"ours": save, "accelerate": self.save_by_accelerate, "dcp": self.save_by_dcp}
        meeting_point = f"file://{self.folder / 'meeting-point'}"
        torch.distributed.init_process_group("gloo", meeting_point, rank=0, world_size=1)
        try:
            seconds = interleave({name: after_a_step(way) for name, way in ways.items()}, runs)
        finally:
            torch.distributed.destroy_process_group()
        shares = {
            name: spread([100 * share for share in ratios(seconds["ours"], seconds[name])], "%")
            for name in ("accelerate", "dcp")
        }
        parameters = sum(p.numel() for p in self.state.core_model.parameters())
        return {
            "parameters": f"{parameters / 1e6:.0f} M",
            "training waits for a save": spread(seconds["ours"], " ms", 1e-3),
            "Accelerator.save_state of the same state": spread(seconds["accelerate"], " ms", 1e-3),
            "share of it": shares["accelerate"],
            "torch async_save until it returns": spread(seconds["dcp"], " ms", 1e-3),
            "share of that": shares["dcp"],
            "from the beginning of a save to its commit": spread(commits[1:], " s"),
        }

    def compare_steps(
        self, runs: int, begin: Callable[[], object], is_busy: Callable[[], bool], what: str
    ) -> dict[str, str]:
        """Compare steps alone with steps beside something that goes on in the background.

        `what` says for people what a checkpoint goes through.
        """
        alone, beside = [], []
        for _ in range(runs):
            alone += [self.step() for _ in range(4)]
            begin()
            while is_busy():
                beside.append(self.step())
        ratio = statistics.median(beside) / statistics.median(alone)
        return {
            "a step alone": spread(alone, " ms", 1e-3),
            f"a step while a checkpoint is {what}": spread(beside, " ms", 1e-3),
            "ratio of the medians": f"{ratio:.3f}x",
        }

    def measure_steps(self, runs: int) -> dict[str, str]:
        """Compare steps beside a save in progress with steps alone."""
        found = self.compare_steps(runs, self.save, lambda: self.saver.is_busy, "written")
        self.finish_save()
        return found

    def measure_run(self, runs: int) -> dict[str, str]:
        """Compare whole runs of 50 steps with five saves: ours, those of a peer, none."""
        steps = 50
        cpu: dict[str, list[float]] = {"ours": [], "accelerate": [], "none": []}

        def train(name: str, save: Callable[[int], object]) -> float:
            os.sync()  # what the run before wrote is no burden to this one
            before, begin = self.cpu_seconds(), time.perf_counter()
            for number in range(1, steps + 1):
                self.step()
                if number % (steps // 5) == 0:
                    save(number)
            self.saver.wait()
            seconds = time.perf_counter() - begin
            cpu[name].append(self.cpu_seconds() - before)
            return seconds

        def save(number: int) -> None:
            self.saver.wait()
            self.save()

        def train_with_saves() -> float:
            seconds = train("ours", save)
            self.finish_save()
            return seconds

        def train_with_accelerate() -> float:
            seconds = train("accelerate", self.save_durably_by_accelerate)
            shutil.rmtree(self.folder / "accelerate")
            return seconds

        before = anonymous_bytes()
        ways = {
            "none": lambda: train("none", lambda number: None),
            "ours": train_with_saves,
            "accelerate": train_with_accelerate,
        }
        seconds = interleave(ways, runs, warm_up=False)
        growth = (anonymous_bytes() - before) / 2**20
        found = {}
        for peer, what in (("accelerate", "with save_state and fsync"), ("none", "without saves")):
            for unit, figures in (("", seconds), (", CPU time", cpu)):
                found[f"{steps} steps with 5 saves against the same {what}{unit}"] = spread(
                    ratios(figures["ours"], figures[peer]), "x"
                )
        return {
            **found,
            "seconds of a run: ours": spread(seconds["ours"], " s"),
            "seconds of a run: save_state and fsync": spread(seconds["accelerate"], " s"),
            "seconds of a run: without saves": spread(seconds["none"], " s"),
            "growth of host memory over these runs": f"{growth:.1f} MiB",
        }
