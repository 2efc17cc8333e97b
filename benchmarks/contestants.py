"""Trainers that are timed against each other, each in a process of its own: JSON lines out.

    python -m benchmarks.contestants ours|plain|trainer JSON

All train the same model from the same shards in the same batches and precision. `ours` is train.py
with everything on: data from a bucket, metrics, TensorBoard, checkpoints, uploads. `plain` is a
PyTorch loop with nothing but the step. `trainer` is `transformers.Trainer` without saves.

Each prints a line when it is warm and at the end of each turn of `turn_steps` steps, and then waits
for a line of standard input (`benchmarks/turns.py`). With `eval_steps` the line has the validation
loss of every so many steps and of the last, all in the same way and out of the measured time.
Settings are those of train.py: `learning_rate` and its schedule, `warmup_steps`, `seed` are
Trainer's too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

OURS, PLAIN, TRAINER = "ours", "plain", "trainer"


class Clock:
    """Takes the time of the steps after `first_step`, turn by turn, up to step `last`."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._first, self._turn_steps = task["first_step"], task["turn_steps"]
        self.last = self._first + task["turns"] * self._turn_steps
        self._eval_steps = task["eval_steps"]
        self._held_out = _read_samples(task, "val_*.npz") if self._eval_steps else None
        self._begin = 0.0

    def note(self, step: int, model: Any) -> None:
        """Take the end of a step; at the end of a turn, wait for the next one."""
        if not self._first <= step <= self.last or (step - self._first) % self._turn_steps:
            return
        torch, peak = sys.modules["torch"], 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        taken = time.perf_counter() - self._begin
        report = {"step": step, "turn_seconds": taken, "peak_bytes": peak, "validation_loss": None}
        if self._eval_steps and (step % self._eval_steps == 0 or step == self.last):
            report["validation_loss"] = _validate(model, self._held_out)
        print(json.dumps(report), file=sys.__stdout__, flush=True)
        if step < self.last:
            sys.stdin.readline()
        self._begin = time.perf_counter()


def run_ours(task: dict[str, Any], clock: Clock) -> None:
    """Run train.py; its clock stands in the loop, so saves and metrics count."""
    import train
    from utils.run.run import TrainingRun

    step = TrainingRun.train_step

    def timed(self: TrainingRun, batches: list[Any]) -> int:
        done = step(self, batches)
        clock.note(done, self.state.core_model)
        return done

    TrainingRun.train_step = timed  # type: ignore[method-assign]
    # One step more: what the last one brings (metrics, a save) is in the measured time.
    settings = {"max_steps": clock.last + 1, **task["settings"]}
    config = settings.pop("config", "test")
    words = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    code = train.main(["--config", config, "--quiet", *words])
    if code:
        raise SystemExit(code)
    logs = [log.read_text("utf-8") for log in Path("logs").rglob("train.log")]
    if any("torch.compile does not work" in log for log in logs):
        raise SystemExit("It was not compiled.")


def run_plain(task: dict[str, Any], clock: Clock) -> None:
    """Run a loop that does the step and nothing else."""
    import torch

    model, device, dtype = _build_model(task)
    settings = task["settings"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    samples = _read_samples(task, "train_*.npz", clock.last)
    micro_batch = settings["per_device_train_batch_size"]
    accumulation = settings["global_batch_size"] // micro_batch
    place = 0
    for step in range(1, clock.last + 1):
        for _ in range(accumulation):
            batch = samples[place : place + micro_batch].to(device)
            place += micro_batch
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.note(step, model)


def run_trainer(task: dict[str, Any], clock: Clock) -> None:
    """Run transformers.Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, device, dtype = _build_model(task)
    settings = task["settings"]
    samples = _read_samples(task, "train_*.npz", clock.last)
    micro_batch = settings["per_device_train_batch_size"]

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.note(state.global_step, model)

    arguments = TrainingArguments(
        output_dir=task["folder"],
        max_steps=clock.last,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings["global_batch_size"] // micro_batch,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings.get("lr_scheduler_type", "linear"),
        warmup_steps=settings.get("warmup_steps", 0),
        seed=settings.get("seed", 42),
        max_grad_norm=1.0,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=settings["logging_steps"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=dtype is not None,
        torch_compile=settings.get("torch_compile", False),
    )
    rows = [{"input_ids": row, "labels": row} for row in samples]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Note()])
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()


def _build_model(task: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return (model, device, dtype of mixed precision or None)."""
    import torch
    from transformers import AutoModelForCausalLM

    from configs.model_config import build_model_config

    settings = task["settings"]
    overrides = settings.get("model_overrides", {})
    config = build_model_config(settings["model"], overrides, settings["sequence_length"])
    torch.manual_seed(settings.get("seed", 1))
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), device, torch.bfloat16 if device.type == "cuda" else None


def _read_samples(task: dict[str, Any], names: str, steps: int = 0) -> Any:
    """Return int64 [samples, sequence_length], all or as many as the steps take, in host memory."""
    import numpy as np
    import torch

    settings = task["settings"]
    shards = sorted(Path(settings["data_uri"]).glob(names))
    tokens = np.concatenate([np.load(shard)["input_ids"].ravel() for shard in shards])
    length = settings["sequence_length"]
    wanted = max(steps * settings["global_batch_size"], len(tokens) // length)
    tokens = np.resize(tokens, wanted * length).astype(np.int64)
    return torch.from_numpy(tokens.reshape(wanted, length))


def _validate(model: Any, samples: Any) -> float:
    """Return the mean loss of the samples, one at a time."""
    import torch

    model.eval()
    with torch.no_grad():
        losses: list[float] = [
            model(input_ids=row, labels=row, use_cache=False).loss.item()
            for row in samples.to(model.device).split(1)
        ]
    model.train()
    return sum(losses) / len(losses)


CONTESTANTS = {OURS: run_ours, PLAIN: run_plain, TRAINER: run_trainer}


def main() -> None:
    """Run one contestant; its clock prints what its turns take."""
    name, task = sys.argv[1], json.loads(sys.argv[2])
    os.chdir(task["folder"])
    CONTESTANTS[name](task, Clock(task))


if __name__ == "__main__":
    main()
