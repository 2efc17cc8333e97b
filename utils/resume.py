"""Where a start begins: at step 0, or at a checkpoint, which may begin a new branch.

    directory -> restore -> train state

`plan_start` only reads (but sets damaged checkpoints aside); `commit_start` moves what no longer
belongs to the branch into `set-aside/`, where nothing is lost.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from utils.checkpoint_store import find_latest, set_aside, verify_checkpoint
from utils.errors import CheckpointError, UsageError
from utils.layout import Manifest, RunIdentity, RunPaths, find_checkpoints, new_run_id
from utils.metadata import read_local_checkpoints, select_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a start begins.

    Attributes:
        identity: Run and branch that it writes to.
        checkpoint: What it resumes from, None at step 0.
        manifest: The checkpoint's manifest.
        obsolete: Names of checkpoints that do not belong to the branch.
    """

    identity: RunIdentity
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    obsolete: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps done before it."""
        return self.manifest.step if self.manifest else 0


def require_startable(paths: RunPaths, *, resume: str | None, fresh: bool) -> None:
    """Refuse to begin anew beside an old run's checkpoints unless told to.

    Raises:
        UsageError: There are checkpoints and neither --resume nor --fresh.
    """
    existing = find_checkpoints(paths.checkpoints)
    if existing and resume is None and not fresh:
        raise UsageError(
            f"{paths.checkpoints} already holds checkpoints up to step {existing[-1].step}. "
            "Go on with --resume latest, or set them aside and begin anew with --fresh."
        )


def plan_start(paths: RunPaths, *, resume: str | None, fresh: bool) -> Start:
    """Return where to begin.

    Args:
        paths: The run's directories.
        resume: latest, best, a step, a name or a path; None to begin at step 0.
        fresh: Set what is there aside.

    Raises:
        UsageError: There is no such checkpoint.
        CheckpointError: The checkpoint that was asked for by name is damaged.
    """
    directory = paths.checkpoints
    if resume is None:
        obsolete = tuple(str(name) for name in find_checkpoints(directory)) if fresh else ()
        return Start(RunIdentity(new_run_id()), obsolete=obsolete)
    if resume == "latest":
        checkpoint = find_latest(directory)
        if checkpoint is None:
            log.info("There is no checkpoint in %s yet: starting at step 0.", directory)
            return Start(RunIdentity(new_run_id()))
    else:
        checkpoint = _find_named(directory, resume)
    manifest = verify_checkpoint(checkpoint)
    later = tuple(str(name) for name in find_checkpoints(directory) if name.step > manifest.step)
    branch = manifest.branch + (1 if later else 0)
    return Start(RunIdentity(manifest.run_id, branch), checkpoint, manifest, later)


def _find_named(directory: Path, resume: str) -> Path:
    path = Path(resume)
    if path.name != resume or path.is_absolute():  # a path rather than a name
        if not path.is_dir():
            raise UsageError(f"--resume {resume}: there is no such directory.")
        return path
    checkpoint = select_checkpoint(resume, read_local_checkpoints(directory)).path
    if checkpoint is None:
        raise CheckpointError(f"{resume} is not on this machine.")
    return checkpoint


def commit_start(start: Start, paths: RunPaths) -> None:
    """Set aside the checkpoints that do not belong to the branch."""
    for name in start.obsolete:
        moved = set_aside(paths.checkpoints / name, paths.checkpoints)
        log.info("Set %s aside as %s.", name, moved)
    if start.checkpoint is None and paths.journal.is_file():
        # Another run's states; they belong to the checkpoints that were set aside.
        paths.set_aside.mkdir(exist_ok=True)
        paths.journal.rename(paths.set_aside / f"uploads-before-{start.identity.run_id}.jsonl")
