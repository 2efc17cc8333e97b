"""The plan for the time between a request to stop and the end of the machine: pure functions.

    stop request -> save -> upload what still reaches the bucket -> what survived, and where

The new checkpoint goes up first, then the pending ones from the newest to the oldest. An attempt
on another machine goes on from the newest checkpoint in the bucket: every step up to it is safe,
whatever else is there, and an older one protects nothing once a newer one has arrived. An upload
that cannot end in time protects nothing either, and it would take the time of one that can: those
that fit are planned before it. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.base.text import format_bytes

NEW_CHECKPOINT = "the new checkpoint"
NEW_FATES = {
    True: "it reaches the bucket in time.",
    False: "it will not reach the bucket in time; it stays on this disk and goes up at the next "
    "start.",
    None: "whether it reaches the bucket in time is unknown; if not, it stays on this disk and "
    "goes up at the next start.",
}
PENDING_FATES = {
    True: "Pending, in time",
    None: "Pending, end unknown",
    False: "Pending, up at the next start",
}


@dataclass(frozen=True)
class PlannedUpload:
    """One archive on its way to the bucket.

    Attributes:
        name: The checkpoint's; `NEW_CHECKPOINT` for the one that is still to be saved.
        num_bytes: Its size.
        seconds: What the upload alone takes; None where the speed is unknown.
        arrives: Whether it ends within the grace period; None where that is unknown.
    """

    name: str
    num_bytes: int
    seconds: float | None
    arrives: bool | None


@dataclass(frozen=True)
class GracePlan:
    """What to do in the grace period.

    Attributes:
        grace_seconds: From the request to the end.
        save_seconds: What the save takes; None where unknown.
        upload_bytes_per_second: None where unknown.
        uploads: In the order in which they go up; those that will not arrive come last.
    """

    grace_seconds: float
    save_seconds: float | None
    upload_bytes_per_second: float | None
    uploads: tuple[PlannedUpload, ...]

    def describe(self) -> str:
        """Return the plan as one line."""
        new = next(upload for upload in self.uploads if upload.name == NEW_CHECKPOINT)
        save = "unknown time" if self.save_seconds is None else _seconds(self.save_seconds)
        speed = "an unknown speed"
        if self.upload_bytes_per_second is not None and new.seconds is not None:
            speed = f"{format_bytes(self.upload_bytes_per_second)}/s, {_seconds(new.seconds)}"
        remaining = max(0.0, self.grace_seconds)  # the last step may have taken more than all of it
        parts = [
            f"{remaining:.0f} s of grace: save checkpoint ({save}), then upload it "
            f"({format_bytes(new.num_bytes)} at {speed}): {self._fate(new)}"
        ]
        for arrives, text in PENDING_FATES.items():
            names = [
                upload.name
                for upload in self.uploads
                if upload is not new and upload.arrives is arrives
            ]
            if names:
                parts.append(f"{text}: {', '.join(names)}.")
        return " ".join(parts)

    def _fate(self, new: PlannedUpload) -> str:
        if self.save_seconds is not None and self.save_seconds > self.grace_seconds:
            return "the save itself will not end in time; what was saved before is safe."
        return NEW_FATES[new.arrives]


def plan_grace(
    grace_seconds: float,
    save_seconds: float | None,
    checkpoint_bytes: int,
    upload_bytes_per_second: float | None,
    pending_uploads: Sequence[tuple[str, int]] = (),
) -> GracePlan:
    """Return which of the new and the pending checkpoints reach the bucket in time.

    Args:
        grace_seconds: From now to the end.
        save_seconds: What a save takes; None where none was measured.
        checkpoint_bytes: Size of the new checkpoint.
        upload_bytes_per_second: Measured speed of uploads; None or 0 where none was measured.
        pending_uploads: Name and bytes of what waits already, from the oldest to the newest.
    """
    rate = upload_bytes_per_second or None
    wanted = [(NEW_CHECKPOINT, checkpoint_bytes), *reversed(pending_uploads)]
    arriving: list[PlannedUpload] = []
    late: list[PlannedUpload] = []
    used = save_seconds or 0.0
    for name, num_bytes in wanted:
        seconds = None if rate is None else num_bytes / rate
        arrives = _arrives(seconds, used, grace_seconds, is_save_known=save_seconds is not None)
        (late if arrives is False else arriving).append(
            PlannedUpload(name, num_bytes, seconds, arrives)
        )
        if arrives is not False:
            used += seconds or 0.0
    return GracePlan(grace_seconds, save_seconds, rate, (*arriving, *late))


def _arrives(
    seconds: float | None, used: float, grace_seconds: float, *, is_save_known: bool
) -> bool | None:
    if used + (seconds or 0.0) > grace_seconds:
        return False  # also where the rest is unknown: it can only take longer
    return True if is_save_known and seconds is not None else None


def describe_outcome(saved_name: str | None, verified: Sequence[str], left: Sequence[str]) -> str:
    """Return one line that says what survived, and where.

    Args:
        saved_name: The checkpoint of this stop; None where none was saved.
        verified: Names of the checkpoints that are verified in the bucket since the request.
        left: Names of those that are not in the bucket.
    """
    if saved_name is None:
        parts = ["No new checkpoint was saved."]
    elif saved_name in verified:
        parts = [f"Saved {saved_name}, verified in the bucket."]
    else:
        parts = [f"Saved {saved_name} on this disk."]
    others = [name for name in verified if name != saved_name]
    if others:
        parts.append(f"Verified in the bucket: {', '.join(others)}.")
    if left:
        parts.append(f"Not in the bucket, up at the next start: {', '.join(left)}.")
    return " ".join(parts)


def _seconds(seconds: float) -> str:
    return f"about {max(1, round(seconds))} s"
