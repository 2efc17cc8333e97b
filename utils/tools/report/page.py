"""One HTML file that shows a run: read, laid out by a template, written.

    files of a run -> sections -> page.html (the template) -> one file that needs no other

The page asks for nothing: style and drawings are in it, there is no script, and its own policy
forbids every request. The template escapes all text. No torch here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.training_config import TrainingConfig
from utils.base.errors import StorageError, UsageError
from utils.base.text import printable
from utils.checkpoints.journal import Journal, JournalEntry, UploadState
from utils.checkpoints.layout import RunPaths, parse_checkpoint_name
from utils.checkpoints.views import CheckpointView
from utils.tools.evaluation.log import read_evaluations
from utils.tools.monitor.status import RunWatcher
from utils.tools.report.contents import RunFiles, build_sections
from utils.tools.viewer.report import measure_costs, summarize_all
from utils.tools.viewer.shelf import open_shelf
from utils.tracking.metrics_log import MetricsLog, read_metrics
from utils.uploads.status import build_upload_rows

TEMPLATE = "page.html"


def write_page(files: RunFiles, path: Path) -> int:
    """Write the page of a run; return its size in bytes.

    Raises:
        UsageError: There is nothing to show, or the file cannot be written.
    """
    if not (files.log.events or files.log.records or files.rows):
        paths = RunPaths.of(files.config)
        others = "".join(f" {printable(note)}" for note in files.notes)
        meant = "--config, --run-name and --output-dir say which run is meant."
        raise UsageError(
            f"There is no run to show: nothing is logged in {paths.logs}, and no checkpoint is in "
            f"{paths.checkpoints}. {meant}{others}"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: the name of a page ends in .html.")
    page = render_page(files).encode("utf-8")
    try:
        path.write_bytes(page)
    except OSError as exc:
        raise UsageError(f"{path} cannot be written: {exc.strerror or exc}.") from exc
    return len(page)


def render_page(files: RunFiles) -> str:
    """Return the page of a run as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = build_sections(files)
    name = (
        files.config.run_name or files.status.start.get("run_id") or RunPaths.of(files.config).logs
    )
    return environment.get_template(TEMPLATE).render(
        title=f"Run {printable(name, 100)}",
        sections=sections,
        time=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
    )


def read_run(
    config: TrainingConfig, *, is_remote: bool = False, hourly_price: float | None = None
) -> RunFiles:
    """Read all that a page shows; with `is_remote`, also what is in the bucket.

    Raises:
        UsageError: `is_remote`, and the configuration names no bucket.
        CheckpointError: The directory of checkpoints cannot be read.
    """
    paths = RunPaths.of(config)
    notes: list[str] = []
    metrics, samples = MetricsLog(), MetricsLog()
    with contextlib.suppress(OSError):  # the status says it
        metrics = read_metrics(paths.metrics)
    try:
        samples = read_metrics(paths.samples)
    except OSError as exc:
        notes.append(f"{paths.samples} cannot be read: {exc.strerror or exc}")
    with open_shelf(config) as shelf:
        views = shelf.read(shelf.names)
        rows = shelf.rows(views, hourly_price)
        notes += shelf.notes
    others, states = _read_others(config, views, notes, is_remote=is_remote)
    for row in rows:
        row.update(is_here=True, state=states.get(row["name"], row["state"]))
    for row in summarize_all(others, None, hourly_price):
        rows.append({**row, "is_here": False, "state": states[row["name"]], "kept": ""})
    status = RunWatcher(paths, hourly_price).look()
    return RunFiles(
        config=config,
        log=metrics,
        samples=samples.records,
        evaluations=read_evaluations(paths.evaluations),
        status=status,
        costs=status.costs or (measure_costs(views[-1], hourly_price) if views else None),
        views=views,
        rows=sorted(rows, key=lambda row: row["step"]),
        notes=notes,
    )


def _read_others(
    config: TrainingConfig, views: Sequence[CheckpointView], notes: list[str], *, is_remote: bool
) -> tuple[list[CheckpointView], dict[str, str]]:
    """Return (the checkpoints that are only in the bucket, the states of all by name).

    The bucket says it, or, where it is not asked, the journal.
    """
    here = {view.name for view in views}
    if not is_remote:
        with contextlib.suppress(OSError, RecursionError):  # the shelf notes it
            found = _uploaded(Journal(RunPaths.of(config).journal).latest().values())
            gone = [view for view in found if view.name not in here]
            return gone, {str(view.name): UploadState.VERIFIED.value for view in gone}
        return [], {}
    try:
        with open_shelf(config, is_remote=True) as shelf:
            there = shelf.read(shelf.names)
            notes += shelf.notes
    except StorageError as exc:
        notes.append(f"The bucket could not be read: {exc}")
        return [], {}
    rows = build_upload_rows(views, there, uri=config.bucket_uri, bucket_problem=None)
    states = {row["checkpoint"]: row["state"] for row in rows}
    return [view for view in there if view.name not in here], states


def _uploaded(entries: Iterable[JournalEntry]) -> list[CheckpointView]:
    """Return the checkpoints that the bucket has verified, as far as the journal knows them."""
    named = [(parse_checkpoint_name(entry.checkpoint), entry) for entry in entries]
    return [
        CheckpointView(name, {}, None, upload=entry)
        for name, entry in named
        if name is not None and entry.state is UploadState.VERIFIED
    ]
