"""What is worrying about a run: pure judgements of what was logged and measured.

    records, events, journal, disk -> warnings, each with what to do -> monitor

Every threshold is a constant here. A loss is judged by medians of windows, never by two points; a
run has stalled when the next record is long overdue by the run's own pace. No torch here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.training_config import BAD_STEP_SPAN
from utils.base.text import format_duration, number, printable
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
DISK_DAYS_LIMIT = 1.0
DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class RunWarning:
    """Something to look after.

    Attributes:
        kind: One word that stays the same while it lasts.
        message: What it is.
        advice: What to do.
        subject: What it is about, where there may be several of a kind.
    """

    kind: str
    message: str
    advice: str
    subject: str = ""


@dataclass(frozen=True)
class Pace:
    """How records of the present start have come.

    Attributes:
        usual_seconds: Median time between two records of the training loss; from the time of a
            step where there are too few; None where nothing is known.
        longest_seconds: Longest time without any record so far.
        has_begun: Whether this start has logged anything.
        has_evaluated: Whether an evaluation was among them.
    """

    usual_seconds: float | None = None
    longest_seconds: float = 0.0
    has_begun: bool = False
    has_evaluated: bool = False


def measure_pace(
    records: Sequence[Mapping[str, Any]], times: Sequence[float], start_time: float | None
) -> Pace:
    """Return the pace of a start.

    Args:
        records: Metric records, oldest first.
        times: When each was written, in seconds.
        start_time: When the start began, on the same clock; None where it is not known.
    """
    own = [
        (time, record)
        for time, record in zip(times, records, strict=True)
        if start_time is None or time >= start_time
    ]
    losses = [(time, record) for time, record in own if "loss" in record]
    usual = _median([b[0] - a[0] for a, b in zip(losses, losses[1:], strict=False)])
    if usual is None:
        usual = _expected_gap([record for record in records if "loss" in record])
    moments = [] if start_time is None or not own else [start_time]
    moments += [time for time, _ in own]
    gaps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    return Pace(
        usual_seconds=usual,
        longest_seconds=max(gaps, default=0.0),
        has_begun=bool(own),
        has_evaluated=any("validation_loss" in record for _, record in own),
    )


def _expected_gap(losses: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time of a step x the steps between two records."""
    steps = [b["step"] - a["step"] for a, b in zip(losses, losses[1:], strict=False)]
    interval = _median([float(step) for step in steps if step > 0])
    seconds = number(losses[-1].get("step_seconds")) if losses else None
    return None if interval is None or seconds is None else max(0.0, seconds * interval)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def stall_seconds(pace: Pace) -> float:
    """Return after how long without a record a run has stalled."""
    seconds = max(
        STALL_MIN_SECONDS,
        STALL_GAPS * (pace.usual_seconds or 0.0),
        STALL_LONGEST_GAPS * pace.longest_seconds,
    )
    if not pace.has_begun or pace.usual_seconds is None:
        return max(seconds, FIRST_RECORD_SECONDS)
    return seconds if pace.has_evaluated else max(seconds, FIRST_EVALUATION_SECONDS)


def judge_state(
    state: str, silent_seconds: float | None, stall_seconds: float
) -> RunWarning | None:
    """Warn of a run that does not go on although nobody asked it to stop.

    Args:
        state: A value of RunState.
        silent_seconds: Time since the last record, None where there is none.
        stall_seconds: What the function `stall_seconds` returned.
    """
    silence = "no record yet"
    if silent_seconds is not None:
        silence = f"no record for {format_duration(silent_seconds)}"
    due = f"{silence}, the next was due within {format_duration(stall_seconds)}"
    told = {
        "stalled": (
            due,
            "see the end of train.log and the GPUs; py-spy dump --pid shows where it hangs; stop "
            "it, then --resume latest",
        ),
        "unknown": (due, "look at the run's own machine: it hangs, is gone, or its disk is away"),
        "crashed": (
            "the process is gone without an end record: killed or crashed",
            "see train.log and dmesg (memory?); --resume latest goes on from the last checkpoint",
        ),
        "failed": ("the run ended with an error", "see the end of train.log; then --resume latest"),
    }
    return RunWarning(state, *told[state]) if state in told else None


def judge_loss(losses: Sequence[float]) -> RunWarning | None:
    """Warn where the loss is above where it has been, and does not fall.

    The median of the newest window is compared with the lowest median of the windows before, by
    the noise within that window and by a share of it.

    Args:
        losses: Finite training losses, oldest first.
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
        "lower learning_rate and resume from a checkpoint before the rise, if it goes on",
    )


def judge_newest(record: Mapping[str, Any], loss: float | None) -> list[RunWarning]:
    """Warn of what the newest record says.

    Args:
        record: It, empty where there is none.
        loss: Its loss as it was logged, None for anything that is no number.
    """
    if "loss" not in record:
        return []
    found = []
    if loss is None or not math.isfinite(loss):
        found.append(
            RunWarning(
                "not_finite",
                f"the loss of step {record['step']} is not finite",
                "stop; lower learning_rate; --resume latest goes on from a good state",
            )
        )
    norm = number(record.get("grad_norm"))
    if norm is not None and norm > GRADIENT_NORM_LIMIT:
        found.append(
            RunWarning(
                "gradient_norm",
                f"gradient norm {norm:.4g} at step {record['step']} "
                f"is above {GRADIENT_NORM_LIMIT:g}",
                "normal in the first steps; later: a lower learning_rate, more warmup_steps",
            )
        )
    return found


def judge_bad_steps(events: Iterable[Mapping[str, Any]], step: int | None) -> RunWarning | None:
    """Warn of steps whose update was left out, among the last ones."""
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
    count = f"{len(bad)} bad step{'' if len(bad) == 1 else 's'}"
    return RunWarning(
        "bad_steps",
        f"{count} in the last {BAD_STEP_SPAN}, the last at {last['step']}: {kind} ({policy})",
        "see the log; a lower learning_rate or more warmup_steps, if more of them come",
        subject=str(last["step"]),
    )


def has_failed(entry: JournalEntry) -> bool:
    """Tell whether an upload has failed for good, or is tried only now and then."""
    attempts = number(entry.details.get("attempts")) or 0
    is_permanent = entry.details.get("permanent") is True
    return entry.state is UploadState.FAILED and (is_permanent or attempts >= FAILED_ATTEMPTS)


def judge_uploads(
    failures: Mapping[str, JournalEntry],
    waiting_seconds: Mapping[str, float],
    save_interval_seconds: float | None,
) -> list[RunWarning]:
    """Warn of uploads that failed, and of those that are slower than saves.

    Args:
        failures: The last failure of each checkpoint that has failed and is not verified since.
        waiting_seconds: How long ago the journal first had each one that is not verified.
        save_interval_seconds: Time between two checkpoints, None where it is not known.
    """
    found = []
    for name, entry in failures.items():
        is_permanent = entry.details.get("permanent") is True
        error = printable(entry.details.get("error", "no reason is given"), 200)
        again = "it is not tried again" if is_permanent else "it is tried again now and then"
        found.append(
            RunWarning(
                "upload_failed",
                f"{printable(name, 80)} is not in the bucket ({again}): {error}",
                "python scripts/upload_manager.py status, then retry",
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
                "python scripts/upload_manager.py status; a faster line, or a larger save_steps",
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

    Args:
        free_bytes: Free bytes on the disk of the checkpoints, None where it cannot be read.
        seconds_left: Until it is full at the pace so far, None where it is not filling.
        checkpoint_bytes: Size of the newest checkpoint, None where it is not known.
        eta_seconds: To the end of the run, None where it is not known.
    """
    found = []
    advice = "free some space, lower keep_checkpoints, or let uploads catch up"
    needed = max(DISK_MIN_BYTES, DISK_CHECKPOINTS * (checkpoint_bytes or 0))
    if free_bytes is not None and free_bytes < needed:
        message = (
            f"{free_bytes / 2**30:.1f} GiB of disk are free; "
            f"{DISK_CHECKPOINTS} more checkpoints and some room want {needed / 2**30:.1f} GiB"
        )
        found.append(RunWarning("disk_low", message, advice))
    limit = max(DISK_DAYS_LIMIT * DAY_SECONDS, eta_seconds or 0.0)
    if seconds_left is not None and seconds_left < limit:
        message = f"the disk is full in {seconds_left / DAY_SECONDS:.1f} days at this pace"
        if eta_seconds is not None and seconds_left < eta_seconds:
            message += ", before the run ends"
        found.append(RunWarning("disk_filling", message, advice))
    return found
