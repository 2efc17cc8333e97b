"""Log lines about the time between a request to stop and the end of the machine: pure functions.

    stop request -> save -> upload what still reaches the bucket -> what survived, and where

The new checkpoint goes up first, then the pending ones from the newest to the oldest. An attempt
on another machine goes on from the newest checkpoint in the bucket: an older one protects nothing
once a newer one has arrived. An upload that cannot end in time takes no time from one that can.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.base.text import format_bytes

_NEW = "the new checkpoint"
# Whether an upload ends in time (None: unknown) -> its words.
_NEW_FATES = {
    True: "it reaches the bucket in time.",
    False: "it will not reach the bucket in time; it stays on this disk and goes up at the next "
    "start.",
    None: "whether it reaches the bucket in time is unknown; if not, it stays on this disk and "
    "goes up at the next start.",
}
_PENDING_FATES = {
    True: "Pending, in time",
    None: "Pending, end unknown",
    False: "Pending, up at the next start",
}


def describe_plan(
    grace_seconds: float,
    save_seconds: float | None,
    checkpoint_bytes: int,
    bytes_per_second: float | None,
    pending_uploads: Sequence[tuple[str, int]] = (),
) -> str:
    """Return one line that says which checkpoints reach the bucket in time.

    `save_seconds` is None and `bytes_per_second` None or 0 where none was measured.
    `pending_uploads` are name and bytes of what waits already, from the oldest to the newest.
    """
    is_known = save_seconds is not None and bool(bytes_per_second)
    fates: dict[bool | None, list[str]] = {True: [], None: [], False: []}
    used = save_seconds or 0.0
    for name, num_bytes in [(_NEW, checkpoint_bytes), *reversed(pending_uploads)]:
        seconds = num_bytes / bytes_per_second if bytes_per_second else 0.0
        if used + seconds > grace_seconds:
            fates[False].append(name)  # also where a time is unknown: it can only take longer
        else:
            fates[True if is_known else None].append(name)
            used += seconds
    fate = next(text for arrives, text in _NEW_FATES.items() if _NEW in fates[arrives])
    if save_seconds is not None and save_seconds > grace_seconds:
        fate = "the save itself will not end in time; what was saved before is safe."
    save = "unknown time" if save_seconds is None else _seconds(save_seconds)
    speed = "an unknown speed"
    if bytes_per_second:
        upload = _seconds(checkpoint_bytes / bytes_per_second)
        speed = f"{format_bytes(bytes_per_second)}/s, {upload}"
    # The last step may have taken more than all of the time.
    parts = [
        f"{max(0.0, grace_seconds):.0f} s of grace: save checkpoint ({save}), then upload it "
        f"({format_bytes(checkpoint_bytes)} at {speed}): {fate}"
    ]
    for arrives, text in _PENDING_FATES.items():
        names = [name for name in fates[arrives] if name != _NEW]
        if names:
            parts.append(f"{text}: {', '.join(names)}.")
    return " ".join(parts)


def describe_outcome(saved_name: str | None, verified: Sequence[str], left: Sequence[str]) -> str:
    """Return one line that says what survived, and where.

    `saved_name` is the checkpoint of this stop, if one was saved; `verified` are those in the
    bucket since the request, `left` those that are not there.
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
