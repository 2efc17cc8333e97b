"""Checkpoint directories and logs as train.py writes them, with small files instead of tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from utils.checkpoints.layout import (
    FileEntry,
    Manifest,
    archive_object,
    sidecar_object,
    write_json,
)
from utils.storage.bucket import Bucket, crc32c_of_bytes, crc32c_of_file
from utils.storage.directory import DirectoryBucket

RUN_ID = "20260101-0a1b2c3d"


def loss_at(step: int) -> float:
    return 8.3 * math.exp(-step / 200)


def make_metadata(step: int, **changes: Any) -> dict[str, Any]:
    losses = [loss_at(past) for past in range(10, step + 1, 10)]
    return {
        "step": step,
        "epoch": 0,
        "current_loss": loss_at(step),
        "best_loss": loss_at(step),
        "loss_history": losses[-100:],
        "learning_rates": [0.004 for _ in losses][-100:],
        "validation_metrics": {
            "current_avg_loss": loss_at(step),
            "steps_since_best": 0,
            "loss_trend": "improving",
            "validation_loss": loss_at(step) + 0.1,
            "perplexity": math.exp(loss_at(step) + 0.1),
            "best_validation_loss": loss_at(step) + 0.1,
        },
        "training_progress": {
            "completed_steps": step,
            "total_epochs": 0,
            "files_processed": 0,
            "max_steps": 100,
            "tokens_seen": step * 2048,
            "samples_seen": step * 4,
            "global_batch_size": 4,
            "tokens_per_second": 3400.5,
        },
        "system_info": {
            "cuda_available": False,
            "device_count": 0,
            "mixed_precision": "no",
            "device": "cpu",
            "world_size": 1,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "accelerate": "1.15.0",
            "python": "3.11.7",
            "num_parameters": 5256704,
        },
        "timestamp": "2026-01-01T12:30:25.123456+00:00",
        "run_id": RUN_ID,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        **changes,
    }


def make_history(step: int) -> dict[str, Any]:
    steps = list(range(10, step + 1, 10))
    return {
        "steps": steps,
        "loss_history": [loss_at(past) for past in steps],
        "learning_rates": [0.004 for _ in steps],
        "grad_norms": [1.0 for _ in steps],
        "tokens_per_second": [3400.5 for _ in steps],
        "validation": [{"step": step, "validation_loss": loss_at(step) + 0.1}],
    }


SAMPLE_CONFIG = {"learning_rate": 0.004, "max_steps": 100, "checkpoint_uri": "bucket"}


def make_checkpoint(
    directory: Path, step: int, *, config: dict[str, Any] | None = None, **metadata: Any
) -> Path:
    """Write one committed checkpoint; keyword arguments replace keys of its metadata."""
    path = directory / f"checkpoint-epoch0-step{step}-files0"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * 100)
    files = {
        "metadata.json": make_metadata(step, **metadata),
        "training_metrics.json": make_history(step),
        "training_config.json": config or SAMPLE_CONFIG,
        "data_state.json": {
            "format": 1,
            "epoch": 0,
            "sample_index": step * 4,
            "fingerprint": "abc123",
            "shards": [["a.npz", 1000, 2000, "AAAAAA=="]],
        },
    }
    for name, value in files.items():
        write_json(path / name, value)
    seal(path, step)
    return path


def seal(path: Path, step: int) -> Manifest:
    """Write the manifest of the files as they are now."""
    entries = {
        file.name: FileEntry(file.stat().st_size, crc32c_of_file(file))
        for file in sorted(path.iterdir())
        if file.name != "manifest.json"
    }
    manifest = Manifest(RUN_ID, step, 0, 1, entries)
    write_json(path / "manifest.json", manifest.to_json())
    return manifest


def change_manifest(checkpoint: Path, **changes: Any) -> None:
    """Change values of a manifest, and not the files that it lists."""
    path = checkpoint / "manifest.json"
    write_json(path, {**json.loads(path.read_text("utf-8")), **changes})


def seal_file(checkpoint: Path, name: str) -> None:
    """Make the manifest vouch for a file that was changed."""
    path = checkpoint / name
    files = json.loads((checkpoint / "manifest.json").read_text("utf-8"))["files"]
    files[name] = {"size": path.stat().st_size, "crc32c": crc32c_of_file(path)}
    change_manifest(checkpoint, files=files)


def publish(
    bucket: Bucket, checkpoint: Path, archive: bytes = b"archive", suffix: str = ".tar.gz"
) -> None:
    """Put an archive of any content into a bucket, with a sidecar that vouches for its bytes."""
    facts = {"size": len(archive), "crc32c": crc32c_of_bytes(archive)}
    sidecar = {
        "manifest": json.loads((checkpoint / "manifest.json").read_text("utf-8")),
        "metadata": json.loads((checkpoint / "metadata.json").read_text("utf-8")),
        "archive": facts if suffix == ".tar.gz" else {**facts, "format": suffix},
    }
    bucket.put_bytes(archive_object(checkpoint.name, suffix), archive)
    bucket.put_bytes(sidecar_object(checkpoint.name), json.dumps(sidecar).encode())


def put_remote(root: Path, checkpoint: Path) -> None:
    """Put an archive and its sidecar into a directory bucket."""
    publish(DirectoryBucket(root), checkpoint)
