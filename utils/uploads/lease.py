"""One trainer at a time on a bucket prefix, whichever machines they run on.

    Checkpoints/.lease.json     who works here: run, host, process, a random token, a beat counter

The holder writes the object anew every heartbeat. A trainer that finds one there watches it for two
of the holder's heartbeats, on its own monotonic clock. If it changes, its holder is alive: the new
trainer refuses to start and names it. If not, the lease is taken over. A holder on this machine
whose process is gone is not waited for. Clocks of different machines are never compared.

Every write has a condition, so that one of two simultaneous writers wins. A holder that stalled
until it was taken over notices at its next beat: it says so and goes on, because an upload over
another run's checkpoints is refused anyway. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from utils.base.errors import (
    AccessDeniedError,
    ConflictError,
    LockedError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from utils.base.text import number, parse_json_object, printable
from utils.checkpoints.layout import REMOTE_FOLDER
from utils.storage.bucket import Bucket, ObjectInfo

LEASE_OBJECT = f"{REMOTE_FOLDER}/.lease.json"
HEARTBEAT_SECONDS = 30.0
PATIENCE_HEARTBEATS = 2
MAX_HEARTBEAT_SECONDS = 300.0
POLLS_PER_WATCH = 8
MAX_ROUNDS = 4
JOIN_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseRecord:
    """What the lease object says of its holder.

    Attributes:
        pid: Process id there, 0 where it cannot be read.
        machine: What tells this boot of this machine and its process ids from all others; empty
            where the system cannot say.
        process_start: When the process started, in clock ticks since the boot; empty where the
            system cannot say. It tells the process from a later one with the same id.
        token: Random; no two holders share it.
        heartbeat_seconds: How often the holder promises to change the object.
        beat: How often it did.
    """

    run_id: str
    host: str
    pid: int
    machine: str
    process_start: str
    token: str
    heartbeat_seconds: float
    beat: int = 0

    def __str__(self) -> str:
        return f"run {printable(self.run_id)}, process {self.pid} on {printable(self.host)}"

    def to_bytes(self) -> bytes:
        """Return the record as it is written."""
        return json.dumps(asdict(self), indent=1).encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes, default_heartbeat: float) -> LeaseRecord:
        """Return what can be read of a lease that may be half written or foreign."""
        try:
            value = parse_json_object(data)
        except ValueError:
            value = {}
        pid, heartbeat = number(value.get("pid")) or 0, number(value.get("heartbeat_seconds")) or 0
        if heartbeat <= 0:
            heartbeat = default_heartbeat
        return cls(
            run_id=str(value.get("run_id", "unknown")),
            host=str(value.get("host", "an unknown host")),
            pid=int(pid) if 0 < pid < 2**31 else 0,
            machine=str(value.get("machine", "")),
            process_start=str(value.get("process_start", "")),
            token=str(value.get("token", "")),
            heartbeat_seconds=min(heartbeat, MAX_HEARTBEAT_SECONDS),
            beat=int(number(value.get("beat")) or 0),
        )


@contextlib.contextmanager
def hold_prefix(
    bucket: Bucket, run_id: str, *, heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> Iterator[PrefixLease]:
    """Hold a bucket prefix for a run, so that a second trainer on it refuses to start.

    Where the credentials do not allow it, a warning is logged and the run goes on without. Which
    run goes on is decided while the prefix is held; the caller then sets the lease's `run_id`. How
    long `bucket` retries is also how long the release may take when it is down.

    Raises:
        LockedError: A live trainer holds the prefix; the message names it.
        StorageError: The bucket cannot be reached.
    """
    lease = PrefixLease(bucket, run_id, heartbeat_seconds)
    try:
        lease.acquire()
    except AccessDeniedError as exc:
        log.warning("%s A second trainer on %s would not be noticed.", exc, bucket.uri)
    try:
        yield lease
    finally:
        lease.release()


class PrefixLease:
    """A hold on a bucket prefix; `hold_prefix` makes it."""

    def __init__(self, bucket: Bucket, run_id: str, heartbeat_seconds: float) -> None:
        assert 0 < heartbeat_seconds <= MAX_HEARTBEAT_SECONDS, heartbeat_seconds
        self.lost: str | None = None
        """Why the prefix is no longer held, None while it is; the run may go on or stop."""
        self.is_held = False
        """Whether this trainer has the lease; False where it may not write one."""
        self.run_id = run_id
        """The run that the lease names, from the next beat on where it is set anew."""
        self._bucket = bucket
        self._record = LeaseRecord(
            run_id=run_id,
            host=platform.node(),
            pid=os.getpid(),
            machine=_machine_id(),
            process_start=(_process_status(os.getpid()) or ("", ""))[1],
            token=secrets.token_hex(16),
            heartbeat_seconds=heartbeat_seconds,
        )
        self._info: ObjectInfo | None = None
        self._stopping = threading.Event()
        self._was_denied = False
        self._thread = threading.Thread(target=self._keep_beating, name="prefix-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease and begin to beat.

        Raises:
            LockedError: A live trainer has it.
            StorageError: The bucket cannot be read or written.
        """
        for _ in range(MAX_ROUNDS):
            seen = self._read()
            expected = None if seen is None else self._find_replaceable(*seen)
            try:
                self._write(expected)
            except ConflictError:
                winner = self._read()
                if winner is not None:
                    raise self._locked_by(winner[0]) from None
            else:
                self.is_held = True
                self._thread.start()
                return
        raise LockedError(f"Other trainers come and go on {self._bucket.uri}. Try again.")

    def release(self) -> None:
        """Stop beating and remove the lease where it is still ours."""
        if not self.is_held:
            return
        self._stopping.set()
        self._thread.join(JOIN_SECONDS)
        self.is_held = False
        if self.lost is not None:
            return
        try:
            if self._thread.is_alive():
                raise StorageError("the bucket does not answer")
            seen = self._read()
            if seen is not None and seen[0].token == self._record.token:
                self._bucket.delete_if(LEASE_OBJECT, seen[1])
        except ConflictError as exc:
            log.debug("The lease was taken over at the end: %s", exc)
        except StorageError as exc:
            log.warning(
                "The lease in %s was not removed (%s). A run from elsewhere waits %.0f s for it.",
                self._bucket.uri,
                exc,
                PATIENCE_HEARTBEATS * self._record.heartbeat_seconds,
            )

    def _write(self, expected: ObjectInfo | None) -> None:
        self._info = self._bucket.put_bytes_if(LEASE_OBJECT, self._record.to_bytes(), expected)

    def _read(self) -> tuple[LeaseRecord, ObjectInfo] | None:
        try:
            data, info = self._bucket.read_version(LEASE_OBJECT)
        except ObjectNotFoundError:
            return None
        return LeaseRecord.from_bytes(data, self._record.heartbeat_seconds), info

    def _find_replaceable(self, record: LeaseRecord, info: ObjectInfo) -> ObjectInfo | None:
        """Return the version of a dead holder's lease, or None once it was released.

        Raises:
            LockedError: The holder is alive.
        """
        uri = self._bucket.uri
        if record.machine and record.machine == self._record.machine and _is_gone(record):
            log.info(
                "Taking %s over from a trainer of this machine that is gone (%s).", uri, record
            )
            return info
        patience = PATIENCE_HEARTBEATS * record.heartbeat_seconds
        found = f"{uri} has a lease ({record})."
        log.info("%s Waiting up to %.0f s to see whether that trainer is alive.", found, patience)
        if not self._is_silent(info, patience):
            return None
        message = "The trainer that held %s (%s) gave no sign of life for %.0f s. Taking over."
        log.warning(message, uri, record, patience)
        return info

    def _is_silent(self, info: ObjectInfo, patience: float) -> bool:
        """Watch a lease; tell whether nothing happened to it, False once it is released."""
        failures = 0
        end = time.monotonic() + patience
        while (remaining := end - time.monotonic()) > 0:
            time.sleep(min(patience / POLLS_PER_WATCH, remaining))
            try:
                found = self._read()
            except TransientStorageError as exc:
                # While the bucket is down the holder cannot beat either: the watch begins anew.
                failures += 1
                if failures == MAX_ROUNDS:
                    raise
                log.debug("The lease cannot be read: %s", exc)
                end = time.monotonic() + patience
                continue
            if found is None:
                return False
            if found[1] != info:
                raise self._locked_by(found[0])
        return True

    def _locked_by(self, holder: LeaseRecord) -> LockedError:
        return LockedError(
            f"{self._bucket.uri} is in use by another trainer ({holder}). "
            "Wait for it or stop it, or give this run a name of its own: --set run_name=NAME."
        )

    def _keep_beating(self) -> None:
        started = time.monotonic()
        while self.lost is None:
            due = started + self._record.heartbeat_seconds
            if self._stopping.wait(max(0.0, due - time.monotonic())):
                return
            started = time.monotonic()
            try:
                self._beat()
            except AccessDeniedError as exc:
                level = logging.DEBUG if self._was_denied else logging.WARNING
                log.log(level, "%s A second trainer would take this one for dead.", exc)
                self._was_denied = True
            except Exception:  # noqa: BLE001 - without a thread this trainer would look dead
                log.debug("The lease could not be written; tried again soon.", exc_info=True)

    def _beat(self) -> None:
        self._record = replace(self._record, run_id=self.run_id, beat=self._record.beat + 1)
        try:
            self._write(self._info)
        except ConflictError:
            found = self._read()
            if found is not None and found[0].token != self._record.token:
                self.lost = (
                    f"{self._bucket.uri} was taken over by another trainer ({found[0]}) while this "
                    "one stalled. Stop one of the two."
                )
                log.error("%s", self.lost)
                return
            # Our own write, whose answer was lost, or somebody removed the object.
            self._write(found[1] if found is not None else None)


def _is_gone(record: LeaseRecord) -> bool:
    """Tell whether the holder, a process of this machine, has ended for certain."""
    if record.pid == 0:
        return False
    if not psutil.pid_exists(record.pid):
        return True
    status = _process_status(record.pid)
    if status is None or not record.process_start:
        return False
    state, start = status
    return state in ("Z", "X") or start != record.process_start


def _process_status(pid: int) -> tuple[str, str] | None:
    """Return a process's state letter and start (ticks since the boot), as /proc/PID/stat has them.

    Unlike a time of day, the start does not move when somebody sets the clock. See proc(5).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return (fields[0], fields[19]) if len(fields) > 19 else None


def _machine_id() -> str:
    """Return what tells this boot and this space of process ids from all others, or ""."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{platform.node()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
