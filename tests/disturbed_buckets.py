"""Buckets that fail, at random, while somebody uploads into them: a directory, and the fake GCS.

A `Stage` is given the troubles of a run before it begins, is asked to `tick` while it runs, and
is calmed when it is over. What happens follows from the random source that draws the troubles.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gcs_server import ApiError, FakeGcsServer, Fault
from utils.checkpoints.layout import archive_object, parse_checkpoint_name

BUCKET = "runs"
MEGABYTE = 2**20
# Kind -> how likely it is.
TROUBLES = {
    "status": 0.24,
    "reset": 0.14,
    "truncate": 0.1,
    "stall": 0.08,
    "slow": 0.06,
    "corrupt": 0.06,
    "lost_answer": 0.14,
    "forbidden": 0.06,
    "down": 0.06,
    "replaced": 0.06,
}
BRIEF_TROUBLES = ("status", "reset", "truncate", "lost_answer")
REQUESTS = (
    "upload",
    "upload.multipart",
    "upload.chunk",
    "object.compose",
    "object.delete",
    "object.get",
    "object.list",
    "object.download",
)
REFUSED = ("*", "upload", "object.delete", "object.list", "object.get")


@dataclass
class Trouble:
    """Something that goes wrong with the bucket.

    Attributes:
        kind: One of TROUBLES.
        at: When it begins, in seconds after the launch.
        seconds: How long it lasts; a stall, from when it is met.
        fault: What the server is told to do, None where that is not how it is done.
        has_begun: It is or was there.
        over_at: When it ends, None while that is open.
    """

    kind: str
    at: float = 0.0
    seconds: float = 1e9
    fault: Fault | None = None
    has_begun: bool = False
    over_at: float | None = None


def draw_trouble(kind: str, source: random.Random, seconds: float, stall_seconds: float) -> Trouble:
    """Return a trouble of a kind, of which `source` decides what is left open.

    An upload takes about `seconds`; a client waits `stall_seconds` for a sign of life.
    """
    after_bytes = int(2 ** source.uniform(0, 24))
    times, at = source.randint(1, 3), source.uniform(0.0, seconds)
    if kind == "down":
        return Trouble(kind, at, source.uniform(0.5, 6.0))
    if kind == "forbidden":
        fault = Fault("status", None, source.choice(REFUSED), status=403)
        return Trouble(kind, at, source.uniform(0.5, 2 * seconds), fault)
    if kind == "replaced":  # an upload is held in its middle, so that it cannot be over
        fault = Fault("stall", 1, "upload", name="*.tar.gz*", after_bytes=after_bytes)
        return Trouble(kind, seconds=0.0, fault=fault)
    if kind == "status":
        status, operation = source.choice((429, 500, 503)), source.choice(("*", *REQUESTS))
        fault = Fault("status", times, operation, status=status, skip=source.randrange(4))
    elif kind == "lost_answer":
        fault = Fault("lost_answer", skip=source.randrange(5))
    elif kind == "slow":
        rate = source.randrange(4, 16) * MEGABYTE
        fault = Fault("slow", times, "upload", bytes_per_second=rate)
    else:
        skip, operation = source.randrange(3), "upload" if kind == "corrupt" else "*"
        name: Any = kind
        fault = Fault(name, min(times, 2), operation, skip=skip, after_bytes=after_bytes)
    lasting = source.uniform(0.5, 3 * stall_seconds) if kind == "stall" else 1e9
    return Trouble(kind, seconds=lasting, fault=fault)


class DirectoryStage:
    """A directory, which can only be there or not."""

    def __init__(self, folder: Path) -> None:
        self._root, self._away = folder / "bucket", folder / "bucket-away"
        self.uri = str(self._root)
        self.environment: dict[str, str] = {}
        self._troubles: list[Trouble] = []
        self._seen: set[str] = set()
        self._num_before = 0

    def objects(self) -> dict[str, Path]:
        """Return what is there: object name -> file with its bytes."""
        files = (path for path in self._root.rglob("*") if path.is_file())
        return {path.relative_to(self._root).as_posix(): path for path in files}

    def disturb(self, troubles: list[Trouble]) -> None:
        """Set the troubles of the next run."""
        self._troubles = [trouble for trouble in troubles if trouble.kind == "down"]
        self._seen |= self.objects().keys()
        self._num_before = len(self._seen)

    def tick(self, seconds: float) -> None:
        """Do what is due so many seconds after the launch."""
        for trouble in self._troubles:
            if not trouble.has_begun and seconds >= trouble.at and self._root.is_dir():
                trouble.has_begun, trouble.over_at = True, seconds + trouble.seconds
                self._root.rename(self._away)
                self._root.touch()  # a file: nobody can make the directory anew
            elif trouble.over_at is not None and seconds >= trouble.over_at:
                trouble.over_at = None
                self._bring_back()

    def calm(self) -> Counter[str]:
        """End all troubles; return how often each has been met."""
        self._bring_back()
        return Counter(trouble.kind for trouble in self._troubles if trouble.has_begun)

    def count_events(self, operation: str) -> int:
        """Return how many files came since `disturb`, temporary ones too: nobody is asked here."""
        self._seen |= self.objects().keys()
        return len(self._seen) - self._num_before

    def phase(self) -> str:
        """Say whether an archive is being written."""
        names = [Path(name).name for name in self.objects()]
        return "archive" if any(name.startswith(".tmp-") for name in names) else "elsewhere"

    def _bring_back(self) -> None:
        if self._away.is_dir():
            self._root.unlink()
            self._away.rename(self._root)


class ServerStage:
    """A bucket of the fake server."""

    def __init__(self, server: FakeGcsServer, folder: Path, prefix: str, *, has_tls: bool) -> None:
        self._server, self._prefix = server, prefix
        self.uri = f"gs://{BUCKET}/{prefix}"
        clients = folder / "clients"
        self.environment = {
            **server.client_environment(),
            **server.gcloud_environment(clients),
            **(server.gsutil_environment(clients) if has_tls else {}),
        }
        self._troubles: list[Trouble] = []
        self._is_up = True

    def objects(self) -> dict[str, Path]:
        found = {}
        for name in self._server.list_objects(BUCKET):
            with contextlib.suppress(ApiError):  # a request of a killed run may remove it yet
                path = self._server.get_object(BUCKET, name).blob.path
                found[name.removeprefix(f"{self._prefix}/")] = path
        return found

    def disturb(self, troubles: list[Trouble]) -> None:
        self._server.clear_requests()
        self._troubles = troubles

    def tick(self, seconds: float) -> None:
        for trouble in self._troubles:
            if not trouble.has_begun and seconds >= trouble.at:
                self._begin(trouble, seconds)
            if trouble.over_at is None and trouble.fault is not None and trouble.fault.fired:
                if trouble.kind == "replaced":
                    self._replace_what_is_held()
                trouble.over_at = seconds + trouble.seconds
            if trouble.over_at is not None and seconds >= trouble.over_at:
                self._end(trouble)

    def calm(self) -> Counter[str]:
        self._server.clear_faults()
        self._set_up(is_up=True)
        met: Counter[str] = Counter()
        for trouble in self._troubles:
            met[trouble.kind] += trouble.fault.fired if trouble.fault else trouble.has_begun
        return met

    def count_events(self, operation: str) -> int:
        """Return how many there were in this run."""
        return len(self._server.requests(operation))

    def phase(self) -> str:
        """Return the last request, and whether it goes on."""
        records = self._server.requests()
        if not records:
            return "elsewhere"
        return f"{'after' if records[-1].finished else 'in'} {records[-1].operation}"

    def _begin(self, trouble: Trouble, seconds: float) -> None:
        trouble.has_begun = True
        if trouble.kind == "down":
            self._set_up(is_up=False)
        if trouble.fault is not None:
            self._server.add_fault(trouble.fault)
        if trouble.kind in ("down", "forbidden"):
            trouble.over_at = seconds + trouble.seconds

    def _end(self, trouble: Trouble) -> None:
        trouble.over_at = float("inf")
        if trouble.kind == "down":
            self._set_up(is_up=True)
        if trouble.fault is not None:
            trouble.fault.times = 0
            trouble.fault.release()

    def _set_up(self, *, is_up: bool) -> None:
        if is_up and not self._is_up:
            self._server.start()
        elif self._is_up and not is_up:
            self._server.stop()
        self._is_up = is_up

    def _replace_what_is_held(self) -> None:
        """Put another object where an archive is just being uploaded to."""
        held = [record.name for record in self._server.requests("upload") if not record.finished]
        for part in {part for name in held for part in name.removesuffix(".tar.gz").split("/")}:
            name = part.removesuffix(".tar.gz")
            if parse_checkpoint_name(name) is not None:
                self._server.put_object(BUCKET, f"{self._prefix}/{archive_object(name)}", b"other")


Stage = DirectoryStage | ServerStage
"""A bucket that can be disturbed."""
