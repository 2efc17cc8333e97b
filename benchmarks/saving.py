"""Saving: how long training waits, its steps meanwhile, a run with saves against one without."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import anonymous_bytes, spread

VOCABULARY = 50257


def measure_checkpoint(folder: Path, runs: int) -> dict[str, str]:
    """Measure saving: a GPT-NeoX of 70M parameters on a CPU, the 1.2B one on a GPU."""
    bench = SavingBench(folder)
    try:
        return {**bench.measure_blocking(runs), **bench.measure_steps(runs), **bench.measure_run(3)}
    finally:
        bench.close()


class SavingBench:
    """A train state with its saver, as a run builds them.

    Args:
        folder: For checkpoints.
        shape: Of the model on a CPU; 70M parameters by default.
    """

    def __init__(self, folder: Path, shape: dict[str, int] | None = None) -> None:
        import torch
        from accelerate.state import AcceleratorState

        from configs.model_config import build_model_config
        from configs.training_config import get_training_config
        from utils.base.machine import available_memory
        from utils.checkpoints.saver import CheckpointSaver
        from utils.training_utils import (
            build_accelerator,
            build_train_state,
            resolve_precision,
            set_determinism,
        )

        AcceleratorState._reset_state(reset_partial_state=True)
        self.folder = folder
        on_gpu = torch.cuda.is_available()
        shape = shape or {
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "vocab_size": VOCABULARY,
        }
        overrides: dict[str, Any] = {f"model_overrides.{k}": v for k, v in shape.items()}
        overrides["global_batch_size"] = 1
        if on_gpu:
            overrides = {
                "model": "refocused-1.2b",
                "sequence_length": 2048,
                "per_device_train_batch_size": 8,
                "global_batch_size": 16,
            }
        self.config = get_training_config("test", {**overrides, "max_steps": 10**6})
        model_config = build_model_config(
            self.config.model, self.config.model_overrides, self.config.sequence_length
        )
        precision = resolve_precision(self.config)
        self.accelerator = build_accelerator(self.config, precision, [], folder)
        set_determinism(self.config)
        self.state = build_train_state(self.accelerator, model_config, self.config)
        tokens = (self.config.per_device_train_batch_size, 2048 if on_gpu else 128)
        vocabulary = model_config.vocab_size
        self.batches = [torch.randint(0, vocabulary, tokens) for _ in range(2 if on_gpu else 1)]
        self.number = 0
        self.saver = CheckpointSaver(
            folder / "ours", self.accelerator.device, lambda checkpoint: None
        )
        self.step()
        self.saver.prepare(self.state.division.snapshot_bytes(), available_memory())
        while self.saver._writer is not None and not self.saver._writer.is_ready():
            time.sleep(0.1)
        self.parameters = sum(p.numel() for p in self.state.core_model.parameters())

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> float:
        """Do one step; return its seconds."""
        from utils.training_utils import train_step

        begin = time.perf_counter()
        train_step(self.state, self.batches, 1.0, None, self.saver.fence)
        self.synchronize()
        return time.perf_counter() - begin

    def save(self) -> float:
        """Begin to save as a run does; return the seconds that training waits."""
        from utils.base.machine import available_memory
        from utils.checkpoint_utils import (
            add_held_state,
            capture_random_state,
            collect_files,
        )
        from utils.checkpoints.layout import RunIdentity
        from utils.data.data_state import DataState

        self.number += 1
        self.state.progress.step = self.number
        begin = time.perf_counter()
        told = (
            DataState(0, 0, 0, 128, 0, 1, ()),
            self.config,
            RunIdentity("20260101-0a1b2c3d"),
        )
        rest = collect_files(self.state, *told, [capture_random_state(self.state)], {})
        files = add_held_state(self.state, *told, rest)
        assert files is not None
        self.saver.save(files, available_memory())
        return time.perf_counter() - begin

    def finish_save(self) -> None:
        """Wait for the commit; remove what was written."""
        import shutil

        self.saver.wait()
        if self.saver.failure is not None:
            raise self.saver.failure
        shutil.rmtree(self.folder / "ours")
        (self.folder / "ours").mkdir()

    def save_by_accelerate(self) -> float:
        """Return the seconds of Accelerator.save_state of the same state."""
        import shutil

        begin = time.perf_counter()
        self.accelerator.save_state(str(self.folder / "accelerate"))
        seconds = time.perf_counter() - begin
        shutil.rmtree(self.folder / "accelerate")
        return seconds

    def save_by_dcp(self) -> float:
        """Return the seconds until torch's async_save of the same state returns."""
        import shutil

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

        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'meeting-point'}",
            rank=0,
            world_size=1,
        )
        ways = {"ours": self.save, "accelerate": self.save_by_accelerate, "dcp": self.save_by_dcp}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        commits = []
        try:
            for number in range(runs + 1):
                for way, measure in ways.items():
                    os.sync()  # what the one before wrote is no burden to this one
                    self.step()
                    taken = measure()
                    if way == "ours":
                        self.finish_save()
                        commits.append(self.saver.last_seconds or 0.0)
                    if number:  # the first is a warm-up
                        seconds[way].append(taken)
        finally:
            torch.distributed.destroy_process_group()
        shares = {
            way: [100 * a / b for a, b in zip(seconds["ours"], seconds[way], strict=True)]
            for way in ("accelerate", "dcp")
        }
        return {
            "parameters": f"{self.parameters / 1e6:.0f} M",
            "training waits for a save": spread(seconds["ours"], " ms", 1e-3),
            "Accelerator.save_state of the same state": spread(seconds["accelerate"], " ms", 1e-3),
            "share of it": spread(shares["accelerate"], "%"),
            "torch async_save until it returns": spread(seconds["dcp"], " ms", 1e-3),
            "share of that": spread(shares["dcp"], "%"),
            "from the beginning of a save to its commit": spread(commits[1:], " s"),
        }

    def measure_steps(self, runs: int) -> dict[str, str]:
        """Compare steps beside a save in progress with steps alone."""
        alone, beside = [], []
        for _ in range(runs):
            alone += [self.step() for _ in range(4)]
            self.save()
            while self.saver.is_busy:
                seconds = self.step()
                if self.saver.is_busy:
                    beside.append(seconds)
            self.finish_save()
        ratio = statistics.median(beside) / statistics.median(alone)
        return {
            "a step alone": spread(alone, " ms", 1e-3),
            "a step while a checkpoint is written": spread(beside, " ms", 1e-3),
            "ratio of the medians": f"{ratio:.3f}x",
        }

    def measure_run(self, runs: int, steps: int = 50) -> dict[str, str]:
        """Compare a run of 50 steps with five saves with the same run without."""

        def train(saves: int) -> float:
            begin = time.perf_counter()
            for number in range(1, steps + 1):
                self.step()
                if saves and number % (steps // saves) == 0:
                    self.saver.wait()
                    self.save()
            self.saver.wait()
            seconds = time.perf_counter() - begin
            if saves:
                self.finish_save()
            return seconds

        ratios, before = [], anonymous_bytes()
        for _ in range(runs):
            plain = train(0)
            ratios.append(train(5) / plain)
        return {
            f"{steps} steps with 5 saves against none": spread(ratios, "x"),
            "growth of host memory over these runs": (
                f"{(anonymous_bytes() - before) / 2**20:.1f} MiB"
            ),
        }

    def close(self) -> None:
        """End the saver."""
        self.saver.close()
