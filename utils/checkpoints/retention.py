"""Which checkpoints to keep, here and in the bucket: pure functions of what is known about them.

    journal, checkpoint directory -> facts -> decisions -> checkpoint store, upload manager, viewer

`keep_reasons` is the ladder of rules that both places share.

Nothing is deleted before its upload is verified, unless uploading is off. The newest, the best and
what is being uploaded are never deleted. Past `max_unverified`, the oldest unverified checkpoint
that is none of these is given up (`superseded`), so that a dead bucket cannot fill the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from configs.training_config import TrainingConfig
from utils.checkpoints.journal import UploadState
from utils.checkpoints.views import CheckpointView, find_best, is_verified_in


class Action(StrEnum):
    """What to do with a checkpoint."""

    KEEP = "keep"
    DELETE = "delete"
    SUPERSEDE = "supersede"


@dataclass(frozen=True)
class CheckpointFacts:
    """What retention needs to know of one checkpoint.

    `is_uploading`: it is being archived or uploaded at this moment. `is_removed`: it was verified
    in the bucket, and was removed there on purpose.
    """

    name: str
    step: int
    is_best: bool = False
    is_verified: bool = False
    is_uploading: bool = False
    is_removed: bool = False


@dataclass(frozen=True)
class Decision:
    """What to do with one checkpoint, and why."""

    name: str
    action: Action
    reason: str


def keep_reasons(
    checkpoints: Sequence[CheckpointFacts], *, keep: int, keep_every_steps: int | None = None
) -> Iterator[tuple[CheckpointFacts, str | None]]:
    """Yield each checkpoint, oldest first, with the first rule that keeps it; None where none does.

    The `keep` newest are kept, the newest one always; multiples of `keep_every_steps` for ever.
    """
    ordered = sorted(checkpoints, key=lambda facts: facts.step)
    for age, facts in zip(range(len(ordered) - 1, -1, -1), ordered, strict=True):
        is_multiple = bool(keep_every_steps and facts.step % keep_every_steps == 0)
        rules = (
            ("latest", age == 0),
            ("best", facts.is_best),
            (f"every {keep_every_steps} steps", is_multiple),
            (f"newest {keep}", age < keep),
            ("uploading", facts.is_uploading),
        )
        yield facts, next((reason for reason, is_met in rules if is_met), None)


def plan_retention(
    checkpoints: Sequence[CheckpointFacts],
    *,
    keep_checkpoints: int,
    max_unverified: int,
    is_uploading_on: bool,
    keep_every_steps: int | None = None,
) -> list[Decision]:
    """Return a decision for each checkpoint, oldest first.

    The checkpoints are the complete ones of one branch. Beyond those that are kept,
    `max_unverified` may wait for their upload.
    """
    decisions: dict[str, Decision] = {}
    waiting: list[str] = []
    reasons = keep_reasons(checkpoints, keep=keep_checkpoints, keep_every_steps=keep_every_steps)
    for facts, kept in reasons:
        action, reason = Action.KEEP, kept or _reason_to_go(facts, is_uploading_on)
        if reason is None:
            reason = "not verified in the bucket yet"
            waiting.append(facts.name)
        elif kept is None:
            action = Action.DELETE
        decisions[facts.name] = Decision(facts.name, action, reason)
    for name in waiting[: max(0, len(waiting) - max_unverified)]:
        reason = f"more than {max_unverified} wait for the bucket"
        decisions[name] = Decision(name, Action.SUPERSEDE, reason)
    return list(decisions.values())


def _reason_to_go(facts: CheckpointFacts, is_uploading_on: bool) -> str | None:
    """Return why one that no rule keeps may be deleted, None where it may not."""
    if not is_uploading_on:
        return "uploading is off"
    if facts.is_verified:
        return "verified in the bucket"
    return "removed from the bucket on purpose" if facts.is_removed else None


def decide_retention(
    views: Sequence[CheckpointView], config: TrainingConfig, *, run_id: str, is_uploading_on: bool
) -> list[Decision]:
    """Return what the rules say of each checkpoint of a run on this machine, oldest first.

    Checkpoints of other runs and damaged ones are left out.
    """
    own = [view for view in views if view.manifest is not None and view.manifest.run_id == run_id]
    best = find_best(own)
    facts = []
    for view in own:
        upload = view.upload.state if view.upload else None
        facts.append(
            CheckpointFacts(
                str(view.name),
                view.name.step,
                is_best=view is best,
                is_verified=view.path is not None
                and is_verified_in(config.bucket_uri, view.path, view.upload, view.manifest_crc32c),
                is_uploading=upload in (UploadState.ARCHIVING, UploadState.UPLOADING),
                is_removed=upload is UploadState.REMOVED,
            )
        )
    return plan_retention(
        facts,
        keep_checkpoints=config.keep_checkpoints,
        max_unverified=config.max_unverified,
        is_uploading_on=is_uploading_on,
        keep_every_steps=config.keep_every_steps,
    )
