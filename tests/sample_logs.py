"""Lines of metrics.jsonl as train.py writes them."""

from __future__ import annotations

import math
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.sample_checkpoints import RUN_ID
from utils.tracking.metrics_log import append_metrics


def ago(seconds: float) -> str:
    """Return a moment before now as records have it."""
    moment = datetime.now(UTC) - timedelta(seconds=seconds)
    return moment.isoformat(timespec="seconds")


def write_start(
    path: Path, event: str = "start", step: int = 0, pid: int | None = None, **changes: Any
) -> None:
    record = {
        "event": event,
        "step": step,
        "run_id": RUN_ID,
        "max_steps": 100,
        "world_size": 1,
        "device": "cpu",
        "precision": "no",
        "num_parameters": 5256704,
        "tokens_per_step": 2048,
        "pid": os.getpid() if pid is None else pid,
        "hostname": socket.gethostname(),
    }
    append_metrics(path, {**record, **changes})


def make_step(step: int, loss: float = 5.0, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "loss": loss,
        "perplexity": math.exp(loss),
        "learning_rate": 0.004,
        "grad_norm": 1.25,
        "tokens_seen": step * 2048,
        "tokens_per_second": 3400.0,
        "step_seconds": 0.602,
        "data_wait_share": 0.003,
        "eta_seconds": 3600.0,
        **changes,
    }


def write_step(path: Path, step: int, loss: float = 5.0, **changes: Any) -> None:
    append_metrics(path, make_step(step, loss, **changes))
