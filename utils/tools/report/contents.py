"""What a page of a run says: sections of facts, tables, charts and texts.

    metrics.jsonl, samples.jsonl, evaluations.jsonl, journal, checkpoints, sidecars -> sections

All of it is read from what a run leaves in any case. What is missing or damaged is said in its
place, and the rest is shown. Values may be foreign and are plain text here: the template escapes
them. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.config_files import TRAINING_CONFIG_FILE
from configs.training_config import TrainingConfig
from utils.base.console import without_control_characters
from utils.base.text import ABSENT, format_duration, number, printable, to_json_text
from utils.checkpoints.layout import RunPaths
from utils.checkpoints.views import CheckpointView
from utils.costs.costs import Costs, describe_costs, format_dollars
from utils.tools.evaluation.log import EvaluationLog, newest
from utils.tools.evaluation.text import tables
from utils.tools.monitor.status import RunStatus
from utils.tools.report.charts import draw_svg
from utils.tools.viewer.report import read_curves, read_part
from utils.tools.viewer.text import list_cells, show_time
from utils.tracking.metrics_log import START_EVENTS, MetricsLog
from utils.tracking.plots import METRICS, Series, read_series
from utils.tracking.text_plots import show_count, show_loss, show_rate, show_share

# What keeps a page small, however long the run was.
MAX_ROWS = 200
MAX_TABLES = 20
MAX_SAMPLED_STEPS = 6
MAX_TEXT = 1500
CELL_CHARACTERS = 120

CHARTS = {
    "Loss": ("loss", "validation_loss"),
    "Learning rate": ("learning_rate",),
    "Throughput (tokens/s)": ("tokens_per_second",),
    "Gradient norm": ("grad_norm",),
}


@dataclass(frozen=True)
class RunFiles:
    """What was read of a run.

    Attributes:
        config: What the command was told of the run.
        log: `metrics.jsonl`, whole.
        samples: Records of `samples.jsonl`, by step: `step`, `prompt` and `text`.
        evaluations: `evaluations.jsonl`.
        status: What the monitor says of the run now.
        costs: Machine time and dollars so far, None where nobody counted.
        views: Checkpoints on this machine, by step.
        rows: All checkpoints, here and in the bucket, by step: rows of `list` with `is_here`.
        notes: What could not be read, and why.
    """

    config: TrainingConfig
    log: MetricsLog
    samples: Sequence[Mapping[str, Any]]
    evaluations: EvaluationLog
    status: RunStatus
    costs: Costs | None
    views: Sequence[CheckpointView]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


@dataclass(frozen=True)
class PageTable:
    """A table: rows of cells; `note` says what is left out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    is_folded: bool = False

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        title: str = "",
        *,
        is_folded: bool = False,
    ) -> PageTable:
        """Return a table of the last rows."""
        shown = [[_cell(value) for value in row] for row in rows[-MAX_ROWS:]]
        note = "" if len(shown) == len(rows) else f"The last {len(shown):,} of {len(rows):,}."
        return cls([_cell(name) for name in columns], shown, title, note, is_folded)


@dataclass(frozen=True)
class Section:
    """A part of the page; `charts` are SVG by title, all else is plain text.

    Each of `texts` has a `step`, a `prompt`, and the `text` of the model after it.
    """

    title: str
    lines: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    charts: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[PageTable] = ()
    texts: Sequence[Mapping[str, str]] = ()


def build_sections(files: RunFiles) -> list[Section]:
    """Return the page of a run from top to bottom."""
    series = _read_series(files)
    return [
        _overview(files, series),
        _curves(series),
        _configuration(files),
        _checkpoints(files, series),
        _evaluations(files.evaluations),
        _samples(files.samples),
        _bad_steps(files.log),
        _time_and_cost(files),
    ]


def _cell(value: object) -> str:
    return ABSENT if value is None else printable(value, CELL_CHARACTERS)


def _read_series(files: RunFiles) -> dict[str, Series]:
    """Return every metric over the steps: of the newest checkpoint, then of the log.

    On another machine the log begins at a resume.
    """
    curves = read_curves(files.views[-1], "")[0] if files.views else None
    found = {}
    for metric in METRICS:
        points: dict[float, float] = {}
        if curves is not None and curves.has_steps and metric in curves.series:
            saved = curves.series[metric]
            points = dict(zip(saved.steps, saved.values, strict=True))
        logged = read_series(*files.log.series(metric))
        points |= dict(zip(logged.steps, logged.values, strict=True))
        steps = sorted(points)
        found[metric] = Series(steps, [points[step] for step in steps])
    return found


def _overview(files: RunFiles, series: Mapping[str, Series]) -> Section:
    status, start = files.status, files.status.start
    last = files.rows[-1] if files.rows else {}
    metrics = status.metrics
    step = status.step if status.step is not None else last.get("step")
    best = min(
        zip(series["validation_loss"].values, series["validation_loss"].steps, strict=True),
        default=None,
    )
    precision = start.get("precision")
    device = _cell(start.get("device"))
    device += f", {_cell(precision)}" if precision not in (None, "no") else ""
    ranks = number(start.get("world_size"))
    if ranks is not None and ranks > 1:
        device = f"{ranks:.0f} x {device}"
    facts = {
        "State": f"{status.state.value}: {status.detail}",
        "Steps": show_count(number(step))
        + ("" if status.max_steps is None else f" of {status.max_steps:,}"),
        "Training loss": show_loss(_first(metrics.loss, last.get("current_loss"))),
        "Best validation loss": ABSENT
        if best is None
        else f"{show_loss(best[0])} at step {show_count(best[1])}",
        "Tokens": show_count(_first(metrics.tokens_seen, last.get("tokens_seen"))),
        "Tokens/s": show_count(_first(metrics.tokens_per_second, last.get("tokens_per_second"))),
        "MFU": show_share(_first(metrics.mfu, last.get("mfu"))),
        "Parameters": show_count(_first(start.get("num_parameters"), last.get("num_parameters"))),
        "Machine": device if start else ABSENT,
        "Machine time": ABSENT if files.costs is None else format_duration(files.costs.seconds),
        "Cost": ABSENT if files.costs is None else format_dollars(files.costs.dollars),
        "Run ID": _cell(start.get("run_id") or last.get("run_id")),
        "Code": _cell(last.get("git_commit"))[:12],
    }
    lines = [printable(f"{one.message} {one.advice}") for one in status.warnings]
    lines += [printable(note) for note in [*files.notes, *status.problems]]
    return Section("Overview", lines, {key: text for key, text in facts.items() if text != ABSENT})


def _first(*values: object) -> float | None:
    return next((known for value in values if (known := number(value)) is not None), None)


def _curves(series: Mapping[str, Series]) -> Section:
    charts = {}
    for title, metrics in CHARTS.items():
        drawn = {METRICS[metric]: series[metric] for metric in metrics if series[metric].num_points}
        if drawn:
            charts[title] = draw_svg(drawn, title)
    missing = [title for title in CHARTS if title not in charts]
    lines = [f"Nothing was logged of: {', '.join(missing)}."] if missing else []
    return Section("Curves", lines, charts=charts)


def _configuration(files: RunFiles) -> Section:
    known, lines = _read_configurations(files)
    if not known:
        return Section(
            "Configuration", [*lines, "It is not known: no attempt and no checkpoint has it."]
        )
    config, defaults = known[-1][1], TrainingConfig().to_json()
    rows = [[key, _setting(config[key])] for key in sorted(config)]
    chosen = [row for row in rows if row[1] != _setting(defaults.get(row[0]))]
    changes = [
        [step, key, _setting(before.get(key)), _setting(after.get(key))]
        for (_, before), (step, after) in itertools.pairwise(known)
        for key in sorted(before.keys() | after.keys())
        if _setting(before.get(key)) != _setting(after.get(key))
    ]
    shown = [
        PageTable.of(["key", "value"], chosen, "Changed from the defaults"),
        PageTable.of(["key", "value"], rows, "Every key", is_folded=True),
    ]
    if changes:
        columns = ["at step", "key", "before", "after"]
        shown.insert(1, PageTable.of(columns, changes, "Changed at a resume"))
    elif len(known) > 1:
        lines.append("Unchanged since the start.")
    return Section("Configuration", lines, tables=shown)


def _read_configurations(files: RunFiles) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Return (step, configuration) of each attempt, and what cannot be read.

    Of attempts of an older version, those of the checkpoints on this machine.
    """
    known = [
        (event["step"], event["config"])
        for event in files.log.events
        if event["event"] in START_EVENTS and isinstance(event.get("config"), dict)
    ]
    if known:
        return known, []
    parts = [(view.name.step, *read_part(view, TRAINING_CONFIG_FILE)) for view in files.views]
    problems = [printable(f"Step {step}: {problem}") for step, _, problem in parts if problem]
    return [(step, config) for step, config, _ in parts if config], problems


def _setting(value: object) -> str:
    return value if isinstance(value, str) and value else to_json_text(value, indent=None)


def _checkpoints(files: RunFiles, series: Mapping[str, Series]) -> Section:
    paths, config = RunPaths.of(files.config), files.config
    uri = config.bucket_uri
    bucket = f"Bucket: {uri}" if uri else "No bucket: checkpoint_uri is empty."
    lines = [printable(f"On this machine: {paths.checkpoints}"), printable(bucket)]
    logged = {
        key: dict(zip(series[metric].steps, series[metric].values, strict=True))
        for key, metric in (("current_loss", "loss"), ("validation_loss", "validation_loss"))
    }
    rows = []
    for row in files.rows:
        known = {key: _first(row[key], by_step.get(row["step"])) for key, by_step in logged.items()}
        cells = list_cells({**row, **known})
        del cells["age"]
        state, kept, note = (cells.pop(key) for key in ("state", "kept", "note"))
        here = "yes" if row["is_here"] else "no"
        rows.append({**cells, "here": here, "bucket": state, "kept": kept, "note": note})
    if not rows:
        return Section("Checkpoints", [*lines, "There is none."])
    table = PageTable.of(list(rows[0]), [list(cells.values()) for cells in rows])
    return Section("Checkpoints", lines, tables=[table])


def _evaluations(log: EvaluationLog) -> Section:
    lines = [printable(log.problem)] if log.problem else []
    if not log.evaluations:
        return Section(
            "Evaluations", lines or ["evaluate.py has measured nothing of this run yet."]
        )
    found = [
        PageTable.of(list(rows[0]), [list(row.values()) for row in rows], printable(title))
        for title, rows in tables(newest(log.evaluations))
    ]
    if len(found) > MAX_TABLES:
        lines.append(f"The last {MAX_TABLES} of {len(found)} tables.")
    return Section("Evaluations", lines, tables=found[-MAX_TABLES:])


def _samples(records: Sequence[Mapping[str, Any]]) -> Section:
    kept: list[Mapping[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:  # a resume went back before it
            kept.pop()
        kept.append(record)
    steps = sorted({record["step"] for record in kept})
    if not steps:
        return Section("Sample texts", ["The run wrote none."])
    count = min(MAX_SAMPLED_STEPS, len(steps))
    chosen = {steps[-1 - index * (len(steps) - 1) // max(1, count - 1)] for index in range(count)}
    texts = [
        {
            "step": f"{record['step']:,}",
            "prompt": _cell(record.get("prompt") or "(end of text)"),
            "text": without_control_characters(str(record.get("text") or "")[:MAX_TEXT]).strip()
            or "(nothing that can be seen)",
        }
        for record in kept
        if record["step"] in chosen
    ]
    left_out = [f"Of {count} of {len(steps):,} evaluations."] if count < len(steps) else []
    return Section("Sample texts", left_out, texts=texts[-MAX_ROWS // 4 :])


def _bad_steps(log: MetricsLog) -> Section:
    rows = [
        [
            event["step"],
            event.get("kind"),
            show_loss(number(event.get("loss"))),
            show_rate(number(event.get("grad_norm"))),
            event.get("policy"),
            show_time(event.get("time")),
        ]
        for event in log.events
        if event["event"] == "bad_step"
    ]
    if not rows:
        return Section("Bad steps", ["None."])
    columns = ["step", "kind", "loss", "gradient norm", "bad_step", "time (UTC)"]
    return Section("Bad steps", tables=[PageTable.of(columns, rows)])


def _time_and_cost(files: RunFiles) -> Section:
    costs, lines = files.costs, []
    if costs is None:
        lines.append("The time was not counted.")
    else:
        lines.append(describe_costs(costs))
        if costs.dollars is None:
            lines.append("Set --hourly-price to see costs.")
    rows: list[list[object]] = []
    for event in files.log.events:
        if event["event"] in START_EVENTS:
            begin = [show_time(event.get("time")), event.get("hostname"), event["step"]]
            rows.append([*begin, None, "no end was recorded"])
        elif event["event"] == "end" and rows:
            rows[-1][3:] = [event["step"], event.get("outcome")]
    if rows and files.status.state.is_live:
        rows[-1][3:] = [files.status.step, files.status.state.value]
    columns = ["began (UTC)", "machine", "from step", "to step", "ended"]
    tables_shown = [PageTable.of(columns, rows, "Attempts")] if rows else []
    return Section("Time and cost", lines, tables=tables_shown)
