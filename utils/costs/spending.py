"""What a run has spent: machine time and dollars over all of its attempts, and what restarts lost.

    metrics.jsonl, checkpoint -> spending before an attempt -> meter -> checkpoint, end event

An attempt counts from the launch of its process to its end; the time between two of them does not
count. Seconds count with or without a price; dollars are summed attempt by attempt, so that the
price may change between them. Lost is the time of work that no later attempt built on: steps that
were done again, attempts that failed, and the time from the launch of a restart to its first step.
A clock that goes wrong makes no negative spending. No torch here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from utils.base.text import epoch_seconds, number
from utils.tracking.metrics_log import START_EVENTS, MetricsLog, read_metrics

SECONDS_PER_HOUR = 3600.0
# Above these a figure is no measurement of anything: it is from a damaged or foreign file.
MAX_SECONDS, MAX_DOLLARS = 1e10, 1e12
MAX_LAUNCH_SECONDS = 86400.0  # from the launch of a process to its first record


@dataclass(frozen=True)
class Amount:
    """Machine time and what it cost.

    `dollars` is the cost of the seconds whose price was known; `unpriced_seconds` are the others.
    """

    seconds: float = 0.0
    dollars: float = 0.0
    unpriced_seconds: float = 0.0

    @classmethod
    def of(cls, seconds: float, hourly_price: float | None) -> Amount:
        """Return a time at a price; None where it is not known."""
        seconds = max(0.0, seconds)
        if hourly_price is None:
            return cls(seconds, 0.0, seconds)
        return cls(seconds, seconds / SECONDS_PER_HOUR * hourly_price)

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.seconds + other.seconds,
            self.dollars + other.dollars,
            self.unpriced_seconds + other.unpriced_seconds,
        )

    def __sub__(self, other: Amount) -> Amount:
        return Amount(
            max(0.0, self.seconds - other.seconds),
            max(0.0, self.dollars - other.dollars),
            max(0.0, self.unpriced_seconds - other.unpriced_seconds),
        )

    def priced_at(self, hourly_price: float | None) -> Amount:
        """Return the same with a price for the seconds that had none."""
        if hourly_price is None:
            return self
        return Amount(self.seconds, self.dollars) + Amount(
            0.0, self.unpriced_seconds / SECONDS_PER_HOUR * hourly_price
        )

    @property
    def known_dollars(self) -> float | None:
        """The dollars; None where no second had a price."""
        return None if self.unpriced_seconds >= self.seconds > 0 else self.dollars


@dataclass(frozen=True)
class Spending:
    """What a run has taken up to some moment.

    `lost` is the part whose work was done again or came to nothing. `starts` counts the current
    attempt too.
    """

    total: Amount = Amount()
    lost: Amount = Amount()
    starts: int = 0
    hourly_price: float | None = None

    @property
    def useful(self) -> Amount:
        """What is not lost."""
        return self.total - self.lost

    def to_json(self) -> dict[str, Any]:
        """Return it as a checkpoint and metrics.jsonl keep it."""
        return {
            "starts": self.starts,
            **{key: round(value, 6) for key, value in asdict(self.total).items()},
            **{f"lost_{key}": round(value, 6) for key, value in asdict(self.lost).items()},
            "hourly_price": self.hourly_price,
        }

    @classmethod
    def from_json(cls, value: object) -> Spending | None:
        """Return what a file says was spent; None where it says nothing that can be used."""
        if not isinstance(value, dict) or number(value.get("seconds")) is None:
            return None
        starts = number(value.get("starts")) or 0
        return cls(
            _read_amount(value, ""),
            _read_amount(value, "lost_"),
            int(min(max(0, starts), MAX_SECONDS)),
            read_price(value.get("hourly_price")),
        )


def _read_amount(values: Mapping[str, Any], prefix: str) -> Amount:
    limits = {"seconds": MAX_SECONDS, "dollars": MAX_DOLLARS, "unpriced_seconds": MAX_SECONDS}
    read = {key: number(values.get(f"{prefix}{key}")) or 0.0 for key in limits}
    return Amount(**{key: min(max(0.0, read[key]), limit) for key, limit in limits.items()})


def read_price(value: object) -> float | None:
    """Return an hourly price that a file or a user gives, None where it is none."""
    price = number(value)
    return price if price is not None and 0 <= price <= MAX_DOLLARS else None


def read_spending(log: MetricsLog, now: float | None = None) -> Spending | None:
    """Return what a run has spent according to its metrics.jsonl; None without an attempt in it.

    An attempt that was killed counts up to its last record: what it did after that is not known.

    `now`, in seconds since 1970, is for a newest attempt that is still running.
    """
    found = [place for place, event in enumerate(log.events) if event["event"] in START_EVENTS]
    if not found:
        return None
    start, later = log.events[found[-1]], log.events[found[-1] + 1 :]
    ended = [
        Spending.from_json(event.get("spending")) for event in later if event["event"] == "end"
    ]
    if ended and ended[-1] is not None:
        return ended[-1]
    before = Spending.from_json(start.get("spending")) or Spending()
    price = read_price(start.get("hourly_price"))
    started = epoch_seconds(start.get("time"))
    launched = epoch_seconds(start.get("launched_at"))
    launched = started if launched is None else launched
    if launched is None:
        return before
    if started is not None and started - launched > MAX_LAUNCH_SECONDS:
        launched = started  # a clock that was set in between
    newest = [*log.records[-1:], *later]
    times = [now, started, *(epoch_seconds(record.get("time")) for record in newest)]
    until = max((moment for moment in times if moment is not None), default=launched)
    lost = before.lost
    if before.starts and started is not None:
        lost = lost + Amount.of(min(started - launched, MAX_SECONDS), price)
    total = before.total + Amount.of(min(until - launched, MAX_SECONDS), price)
    return Spending(total, lost, before.starts + 1, price)


def find_spending_before(run_id: str, checkpoint: Spending | None, log: MetricsLog) -> Spending:
    """Return what a run has spent before an attempt, and what of it is lost.

    The checkpoint knows the spending up to its save, metrics.jsonl up to the last record; the
    greater one counts. On a new machine, or without logs, only the checkpoint is known: a lower
    bound.

    `checkpoint` is what had been spent when it was saved: nothing at step 0, None where it is of a
    version that did not count. A log of another run is left out.
    """
    starts = [event for event in log.events if event["event"] in START_EVENTS]
    is_ours = bool(starts) and starts[-1].get("run_id") == run_id
    logged = read_spending(log) if is_ours else None
    known = [spending for spending in (checkpoint, logged) if spending is not None]
    if not known:
        return Spending()
    before = max(known, key=lambda spending: spending.total.seconds)
    lost = before.lost if checkpoint is None else before.total - checkpoint.useful
    return Spending(before.total, lost, max(spending.starts for spending in known))


class SpendingMeter:
    """Counts what an attempt spends.

    The attempt was launched `age_seconds` ago; `clock` never goes back.
    """

    def __init__(
        self,
        before: Spending,
        hourly_price: float | None,
        age_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.before, self._price, self._clock = before, hourly_price, clock
        self._launched = clock() - age_seconds
        self._lost = before.lost
        self._has_steps = False

    @property
    def launched_at(self) -> str:
        """When this attempt was launched: UTC, ISO 8601."""
        moment = time.time() - (self._clock() - self._launched)
        return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")

    def note_step(self) -> None:
        """Call before a step: after a restart, the time up to the first one is lost."""
        if not self._has_steps and self.before.starts:
            self._lost = self._lost + self._elapsed()
        self._has_steps = True

    def go_back(self, checkpoint: Spending | None) -> None:
        """Note that this attempt went back to a checkpoint: what was spent after it is lost."""
        if checkpoint is not None:
            self._lost = self.read().total - checkpoint.useful

    def read(self) -> Spending:
        """Return what the run has spent by now."""
        total = self.before.total + self._elapsed()
        return Spending(total, self._lost, self.before.starts + 1, self._price)

    def _elapsed(self) -> Amount:
        return Amount.of(self._clock() - self._launched, self._price)


def open_meter(
    metrics: Path | None, run_id: str, step: int, saved: object, hourly_price: float | None
) -> SpendingMeter:
    """Return the meter of the attempt that is this process.

    `metrics` is the run's metrics.jsonl as it is before this attempt, None on other ranks; `saved`
    is the spending as the checkpoint has it.
    """
    log = MetricsLog()
    if metrics is not None:
        # A log that cannot be read is missing in the sums; what cannot be written is fatal.
        with contextlib.suppress(OSError):
            log = read_metrics(metrics)
    checkpoint = Spending.from_json(saved) if step else Spending()
    before = find_spending_before(run_id, checkpoint, log)
    return SpendingMeter(before, hourly_price, measure_age(log))


def measure_age(log: MetricsLog) -> float:
    """Return for how many seconds this attempt has run already.

    It begins with this process, but not before the last record in the log: until then the time was
    that of another attempt.
    """
    seen = [epoch_seconds(record.get("time")) for record in log.records[-1:] + log.events[-1:]]
    return limit_age(
        time.time(),
        psutil.Process().create_time(),
        time.monotonic(),
        [moment for moment in seen if moment is not None],
    )


def limit_age(now: float, created: float, uptime: float, seen: list[float]) -> float:
    """Return the age of an attempt from clocks that may be wrong.

    `now`, `created` (the process) and `seen` (records of the attempt before) are seconds since
    1970; times in the future tell nothing. No process is older than the machine's `uptime`.
    """
    past = [now - moment for moment in seen if moment <= now]
    return max(0.0, min([now - created, uptime, *past]))
