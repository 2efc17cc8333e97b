"""What to worry about in a run: pure judgements of what was logged and measured.

    records, events, journal, disk -> warnings, each with what to do -> monitor

Every threshold is a constant here. A loss is judged by medians of windows, never by two points; a
run has stalled when the next record is long overdue by the run's own pace. Whatever is not known is
None. No torch here.
"""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.training_config import BAD_STEP_SPAN
from utils.base.text import count_of, format_bytes, format_duration, number, printable
from utils.checkpoints.journal import JournalEntry, UploadState

GRADIENT_NORM_LIMIT = 10.0

LOSS_WINDOW_RECORDS = 20
LOSS_RISE_SHARE = 0.02  # of the lowest window's median
LOSS_RISE_DEVIATIONS = 3.0  # median absolute deviations of that window

STALL_MIN_SECONDS = 60.0
STALL_GAPS = 5.0  # usual gaps between two records
STALL_LONGEST_GAPS = 2.0  # longest gaps so far: saves and evaluations are among them
FIRST_EVALUATION_SECONDS = 600.0  # while none has been seen
FIRST_RECORD_SECONDS = 1800.0  # loading, compiling, filling the cache

FAILED_ATTEMPTS = 5  # after so many the uploader tries only now and then
UPLOAD_MIN_SECONDS = 60.0  # no upload is late before
DISK_MIN_BYTES = 2**30
DISK_CHECKPOINTS = 2  # there should be room for so many more
DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class RunWarning:
    """Something that needs attention, and what to do.

    `subject` is the checkpoint or step that it is about, where a kind can have several warnings.
    """

    kind: str
    message: str
    advice: str
    subject: str = ""


def stall_seconds(
    timed: Sequence[tuple[Mapping[str, Any], float]], start_time: float | None
) -> float:
    """Return after how long without a record an attempt has stalled, by its own pace.

    Where it has too few records to know the usual gap, earlier ones or the time of a step tell it.

    Args:
        timed: (metric record, seconds at which it was written), oldest first.
        start_time: When the attempt began, on the same clock; None where it is not known.
    """
    own = [pair for pair in timed if start_time is None or pair[1] >= start_time]
    usual = _median(_gaps([time for record, time in own if "loss" in record]))
    if usual is None:
        usual = _expected_gap([record for record, _ in timed if "loss" in record])
    moments = [time for _, time in own]
    if own and start_time is not None:
        moments = [start_time, *moments]
    longest = max(_gaps(moments), default=0.0)  # without any record so far
    seconds = max(STALL_MIN_SECONDS, STALL_GAPS * (usual or 0.0), STALL_LONGEST_GAPS * longest)
    if not own or usual is None:
        return max(seconds, FIRST_RECORD_SECONDS)
    has_evaluated = any("validation_loss" in record for record, _ in own)
    return seconds if has_evaluated else max(seconds, FIRST_EVALUATION_SECONDS)


def _gaps(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def _expected_gap(losses: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time of a step x the steps between two records."""
    interval = _median([gap for gap in _gaps([record["step"] for record in losses]) if gap > 0])
    seconds = number(losses[-1].get("step_seconds")) if losses else None
    return None if interval is None or seconds is None else max(0.0, seconds * interval)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def judge_state(
    state: str, silent_seconds: float | None, stall_seconds: float
) -> RunWarning | None:
    """Warn of a run that ended or hangs although nobody stopped it; `state` is of RunState."""
    silence = "no record yet"
    if silent_seconds is not None:
        silence = f"no record for {format_duration(silent_seconds)}"
    due = f"{silence}, the next was due within {format_duration(stall_seconds)}"
    told = {
        "stalled": (
            due,
            "see the end of train.log and the GPUs; py-spy dump --pid shows where it hangs; stop "
            "it, then go on",
        ),
        "unknown": (due, "look at the run's machine: is the process there, is its disk mounted?"),
        "crashed": (
            "the process is gone without an end record: killed or crashed",
            "unless you stopped it, see train.log and dmesg (memory?); then go on from the last "
            "checkpoint",
        ),
        "failed": ("the run ended with an error", "see the end of train.log, then go on"),
    }
    return RunWarning(state, *told[state]) if state in told else None


def judge_loss(losses: Sequence[float]) -> RunWarning | None:
    """Warn of a loss that has risen and is not falling again.

    The median of the newest window must exceed the lowest median before it by more than the noise
    of that window, and be no lower than the median just before. Losses are finite, oldest first.
    """
    size = LOSS_WINDOW_RECORDS
    windows = [losses[end - size : end] for end in range(len(losses), size - 1, -size)]
    if len(windows) < 2:
        return None
    medians = [statistics.median(window) for window in windows]  # the newest first
    newest, before = medians[0], medians[1]
    lowest = min(range(1, len(medians)), key=lambda index: medians[index])
    low = medians[lowest]
    deviation = statistics.median(abs(loss - low) for loss in windows[lowest])
    margin = max(LOSS_RISE_DEVIATIONS * deviation, LOSS_RISE_SHARE * abs(low))
    if newest <= low + margin or newest < before:
        return None
    return RunWarning(
        "loss_rising",
        f"the loss rises: median {newest:.4g} of the last {size} records, {low:.4g} before",
        "if it goes on, lower learning_rate and resume from a checkpoint before the rise",
    )


def judge_newest(record: Mapping[str, Any], loss: float | None) -> list[RunWarning]:
    """Warn of what the newest record says; `loss` is its loss, NaN too."""
    if "loss" not in record:
        return []
    found = []
    if loss is None or not math.isfinite(loss):
        found.append(
            RunWarning(
                "not_finite",
                f"the loss of step {record['step']} is not finite",
                "stop; lower learning_rate; go on from a good state (--resume latest)",
            )
        )
    norm = number(record.get("grad_norm"))
    if norm is not None and norm > GRADIENT_NORM_LIMIT:
        found.append(
            RunWarning(
                "gradient_norm",
                f"gradient norm {norm:.4g} at step {record['step']} "
                f"is above {GRADIENT_NORM_LIMIT:g}",
                "normal in the first steps; later, lower learning_rate or raise warmup_steps",
            )
        )
    return found


def judge_bad_steps(events: Iterable[Mapping[str, Any]], step: int | None) -> RunWarning | None:
    """Warn of recent steps whose update was skipped."""
    bad = [
        event
        for event in events
        if event.get("event") == "bad_step" and event["step"] > (step or 0) - BAD_STEP_SPAN
    ]
    if not bad:
        return None
    last = bad[-1]
    kind = printable(last.get("kind", "bad"), 40)
    policy = printable(last.get("policy", "-"), 40)
    count = count_of(len(bad), "bad step")
    return RunWarning(
        "bad_steps",
        f"{count} in the last {BAD_STEP_SPAN}, the last at {last['step']}: {kind} ({policy})",
        "see the log; if there are more of them, lower learning_rate or raise warmup_steps",
        subject=str(last["step"]),
    )


def has_failed(entry: JournalEntry) -> bool:
    """Tell whether an upload has failed for good, or is only retried now and then."""
    attempts = number(entry.details.get("attempts")) or 0
    is_permanent = entry.details.get("permanent") is True
    return entry.state is UploadState.FAILED and (is_permanent or attempts >= FAILED_ATTEMPTS)


def judge_uploads(
    failures: Mapping[str, JournalEntry],
    waiting_seconds: Mapping[str, float],
    save_interval_seconds: float | None,
    directory: Path,
) -> list[RunWarning]:
    """Warn of uploads that failed, and of those that are slower than saves.

    Args:
        failures: The last failure of each checkpoint that has not been verified since.
        waiting_seconds: How long each checkpoint that is not verified has waited.
        save_interval_seconds: Time between two checkpoints.
        directory: Where the run's checkpoints are.
    """
    found = []
    command, run = "python scripts/upload_manager.py", f"--run {shlex.quote(str(directory))}"
    for name, entry in failures.items():
        is_permanent = entry.details.get("permanent") is True
        error = printable(entry.details.get("error", "no reason given"), 200)
        again = "not retried" if is_permanent else "retried now and then"
        found.append(
            RunWarning(
                "upload_failed",
                f"{printable(name, 80)} is not in the bucket ({again}): {error}",
                f"{command} {'retry' if is_permanent else 'status'} {run}",
                subject=name,
            )
        )
    late = [
        (seconds, name)
        for name, seconds in waiting_seconds.items()
        if save_interval_seconds is not None
        and seconds > max(save_interval_seconds, UPLOAD_MIN_SECONDS)
        and name not in failures
    ]
    if late:
        seconds, name = max(late)
        found.append(
            RunWarning(
                "upload_lagging",
                f"uploads lag: {len(late)} older than the time between saves, "
                f"{printable(name, 80)} for {format_duration(seconds)}",
                f"{command} status {run}; a faster connection or a larger save_steps",
            )
        )
    return found


def judge_disk(
    free_bytes: int | None,
    seconds_left: float | None,
    checkpoint_bytes: int | None,
    eta_seconds: float | None,
) -> list[RunWarning]:
    """Warn of a disk that is nearly full, or will be before the run ends.

    `seconds_left` is the time until it is full at the pace so far, `eta_seconds` that to the end of
    the run, `checkpoint_bytes` the size of the newest checkpoint.
    """
    found = []
    advice = "free some space, lower keep_checkpoints, or let uploads catch up"
    needed = max(DISK_MIN_BYTES, DISK_CHECKPOINTS * (checkpoint_bytes or 0))
    if free_bytes is not None and free_bytes < needed:
        message = (
            f"only {format_bytes(free_bytes)} of disk are free; "
            f"{DISK_CHECKPOINTS} more checkpoints need {format_bytes(needed)}"
        )
        found.append(RunWarning("disk_low", message, advice))
    limit = max(DAY_SECONDS, eta_seconds or 0.0)
    if seconds_left is not None and seconds_left < limit:
        message = f"the disk will be full in {format_duration(seconds_left)} at this pace"
        if eta_seconds is not None and seconds_left < eta_seconds:
            message += ", before the run ends"
        found.append(RunWarning("disk_filling", message, advice))
    return found
