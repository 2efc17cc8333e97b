"""Where an attempt begins: at step 0, or at a checkpoint, which may begin a new branch.

    directory, bucket -> plan: candidates, newest first -> `utils/start/restore.py`

Everything here only reads; no torch. A checkpoint belongs to the branch if it is of this run and
not past the step where a later branch left its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.config_files import TRAINING_CONFIG_FILE
from configs.training_config import TrainingConfig
from utils.base.errors import CheckpointError, StorageError, UsageError
from utils.checkpoints.layout import (
    METADATA_FILE,
    REMOTE_FOLDER,
    CheckpointName,
    Manifest,
    RunIdentity,
    RunPaths,
    find_checkpoints,
    new_run_id,
    parse_checkpoint_name,
    read_manifest,
)
from utils.checkpoints.run_record import describe_other_runs, read_run_identity
from utils.checkpoints.views import (
    CheckpointView,
    read_json_part,
    read_local_checkpoints,
    select_checkpoint,
)
from utils.command_line.run_config import LOOK_RETRY_SECONDS
from utils.remote.listing import NEWEST_SIDECARS, parse_remote_name, read_remote_checkpoints
from utils.start.checks import Check, require_all
from utils.storage.open import open_bucket

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that an attempt may begin at.

    `path` is where it is on this machine, else `bucket_uri` the bucket that has it and `view` what
    that bucket's listing says of it. `identity` is that of its manifest.
    """

    name: CheckpointName
    identity: RunIdentity
    path: Path | None = None
    bucket_uri: str = ""
    view: CheckpointView | None = None

    def __str__(self) -> str:
        return f"{self.name} in {self.bucket_uri}" if self.path is None else str(self.path)


@dataclass(frozen=True)
class Plan:
    """Where an attempt may begin; nothing has been changed yet.

    `identity` is the run and branch that it belongs to. Candidates come newest first, none at step
    0; the first that can be used is taken, and with `can_walk_back` the next where one cannot.
    `is_older`: the candidate is known not to be the newest of its run. `known` are other identities
    seen beside the candidates, `in_bucket` those of all that the run's own bucket holds. `searched`
    is where a checkpoint was looked for in vain.
    """

    identity: RunIdentity
    candidates: tuple[Candidate, ...] = ()
    can_walk_back: bool = False
    is_older: bool = False
    known: tuple[RunIdentity, ...] = ()
    in_bucket: tuple[RunIdentity, ...] = ()
    searched: str = ""

    @property
    def step(self) -> int:
        """Steps done before the attempt, if the first candidate can be used."""
        return self.candidates[0].name.step if self.candidates else 0


@dataclass(frozen=True)
class Start:
    """Where an attempt begins.

    `checkpoint` is what it resumes from, None at step 0. `obsolete` says by name why a local
    checkpoint does not belong to the branch. `bad_shards` are those known already, by number.
    """

    identity: RunIdentity
    checkpoint: Path | None = None
    obsolete: Mapping[str, str] = field(default_factory=dict)
    bad_shards: tuple[int, ...] = ()


def require_startable(config: TrainingConfig, *, resume: str | None, fresh: bool) -> None:
    """Refuse to begin anew beside an old run's checkpoints unless told to.

    Raises:
        UsageError: There are checkpoints and neither --resume nor --fresh.
    """
    directory = RunPaths.of(config).checkpoints
    existing = find_checkpoints(directory)
    if existing and resume is None and not fresh:
        uri = config.checkpoint_uri
        needs = f" and another checkpoint_uri (their archives stay in {uri})" if uri else ""
        raise UsageError(
            f"{directory} already holds checkpoints up to step {existing[-1].step}. Go on with "
            "--resume latest, begin anew beside them with --set run_name=NAME, or set them aside "
            f"with --fresh{needs}."
        )


def decide_start(config: TrainingConfig, resume: str | None, *, fresh: bool) -> Plan:
    """Return where a run begins; call it once the run's directory and bucket are held.

    Raises:
        UsageError: There is no such checkpoint to resume from, or there are checkpoints and
            neither `resume` nor `fresh`.
        PreflightError: The bucket holds checkpoints of another run.
        StorageError: The bucket is needed and cannot be read.
    """
    require_startable(config, resume=resume, fresh=fresh)
    plan, problems = look_for_start(config, resume, fresh=fresh)
    require_all(problems)
    if plan.searched:
        place, word = Path(config.output_dir), "--set run_name="
        others = describe_other_runs(place, config.run_name, word, are_similar=True)
        if others:
            log.warning("%s", others)
    return plan


def look_for_start(
    config: TrainingConfig, resume: str | None, *, fresh: bool
) -> tuple[Plan, list[Check]]:
    """Return where a run would begin now, and a failed check where its bucket is another run's.

    Where `require_startable` refuses the run, its own bucket is no other run's.

    Raises:
        UsageError: There is no such checkpoint to resume from.
        StorageError: The bucket is needed and cannot be read.
    """
    paths, uri = RunPaths.of(config), config.bucket_uri
    project = config.gcs_user_project
    plan = plan_start(paths, resume=resume, bucket_uri=uri, user_project=project)
    own = {plan.identity.run_id} if plan.candidates else set()
    if resume is None and not fresh:
        own = {one.identity.run_id for one in _local_candidates(paths.checkpoints)}
    others = {identity.run_id for identity in plan.in_bucket} - own
    if not others:
        return plan, []
    text = (
        f"{uri}/{REMOTE_FOLDER} holds checkpoints of another run ({', '.join(sorted(others))}), "
        "which are never overwritten. Give this run a name of its own: --set run_name=NAME."
    )
    return plan, [Check("upload", "fail", text)]


def finished_length(plan: Plan, max_steps: int) -> int:
    """Return the length of a run: its own where it has reached its end, past `max_steps`.

    Nothing is left to train then, and the schedule of what was trained stays as it was.
    """
    for one in plan.candidates[:1]:
        if one.view is not None:
            config = one.view.config
        elif one.path is not None:
            config, _ = read_json_part(one.path / TRAINING_CONFIG_FILE, None)
        own = config.get("max_steps")
        if isinstance(own, int) and max_steps < own <= one.name.step:
            text = "This run has reached its end, step %d: max_steps=%d changes nothing."
            log.info(text, own, max_steps)
            return own
    return max_steps


def find_recorded_base(plan: Plan) -> Mapping[str, Any] | None:
    """Return what the checkpoint to resume says of the model that its run began with.

    None: there is no such checkpoint, or its run began with random weights.
    """
    for one in plan.candidates:
        if one.view is not None:
            metadata = one.view.metadata
        elif one.path is not None:
            metadata, _ = read_json_part(one.path / METADATA_FILE, None)
        found = metadata.get("base")
        if isinstance(found, dict) and isinstance(found.get("config"), dict):
            return found
    return None


def plan_start(
    paths: RunPaths,
    *,
    resume: str | None,
    bucket_uri: str = "",
    user_project: str | None = None,
) -> Plan:
    """Return where an attempt may begin, reading only.

    `resume` is latest, best, a step, a name, a path, or one of these after a bucket's URI; None
    begins at step 0. Only a name or a path may be of another run than `latest`. `bucket_uri` is
    where the run uploads to, "" for nowhere.

    Raises:
        UsageError: There is no such checkpoint, or it is not clear which one is meant.
        StorageError: The bucket that is needed cannot be read.
    """
    local = _local_candidates(paths.checkpoints)
    named = None if resume is None else parse_remote_name(resume)
    is_path = resume is not None and Path(resume).name != resume
    remote: list[Candidate] = []
    in_bucket: tuple[RunIdentity, ...] = ()
    if bucket_uri:
        try:
            remote, in_bucket = _read_bucket(bucket_uri, user_project)
        except StorageError as exc:
            # Where nothing is here, a bucket that cannot be read must not look like an empty one.
            if resume is not None and not is_path and not local:
                raise
            log.warning("The checkpoints in %s cannot be listed: %s", bucket_uri, exc)
    if resume is None:
        plan = Plan(RunIdentity(new_run_id()))
    elif named is not None:
        uri, which = named
        there = remote if remote and uri == bucket_uri else _read_bucket(uri, user_project)[0]
        plan = _plan_named(which, there, f"{uri}/{REMOTE_FOLDER}")
    elif is_path:
        plan = _plan_path(Path(resume), remote)
    elif resume == "latest" and (local or remote):
        identity = _find_identity(paths, local, remote)
        plan = Plan(identity, _order([*local, *remote], identity), can_walk_back=True)
    elif resume == "latest":
        where = f"{paths.checkpoints} or {bucket_uri}" if bucket_uri else str(paths.checkpoints)
        plan = Plan(RunIdentity(new_run_id()), searched=where)
    else:
        plan = _plan_chosen(resume, paths, local, remote)
    return replace(plan, in_bucket=in_bucket)


def _read_bucket(
    uri: str, user_project: str | None
) -> tuple[list[Candidate], tuple[RunIdentity, ...]]:
    """Return what a bucket has that can be used, by step, and all that says whose it is."""
    with contextlib.closing(open_bucket(uri, user_project, LOOK_RETRY_SECONDS)) as bucket:
        views = read_remote_checkpoints(bucket, newest=NEWEST_SIDECARS)
    found = []
    for view in views:
        if view.manifest is None or view.problem is not None:
            log.info("%s in %s is passed over: %s.", view.name, uri, view.problem)
        else:
            found.append(Candidate(view.name, view.manifest.identity, None, uri, view))
    return found, tuple(view.manifest.identity for view in views if view.manifest)


def _plan_path(path: Path, remote: Sequence[Candidate]) -> Plan:
    if not path.is_dir():
        raise UsageError(f"--resume {path}: there is no such directory or bucket.")
    manifest = read_manifest(path)
    name = parse_checkpoint_name(path.name) or CheckpointName(manifest.step, 0, 0)
    return _plan_one(Candidate(name, manifest.identity, path), remote)


def _plan_one(found: Candidate, others: Sequence[Candidate]) -> Plan:
    """Return a plan for a checkpoint that was named, where others are known."""
    is_older = any(
        one.identity.run_id == found.identity.run_id and one.name.step > found.name.step
        for one in others
    )
    known = tuple(one.identity for one in others)
    return Plan(found.identity, (found,), is_older=is_older, known=known)


def _plan_named(which: str, remote: Sequence[Candidate], where: str) -> Plan:
    """Return a plan for a checkpoint of a bucket; only a full name says which run is meant."""
    if remote and parse_checkpoint_name(which) is None:
        _require_one_run(remote, where)
    if which == "latest":
        if not remote:
            raise UsageError(f"There is no complete checkpoint in {where}.")
        identity = _newest_branch(remote)
        return Plan(identity, _order(remote, identity), can_walk_back=True)
    chosen = select_checkpoint(which, [one.view for one in remote if one.view is not None])
    return _plan_one(next(one for one in remote if one.view is chosen), remote)


def _require_one_run(candidates: Iterable[Candidate], where: str) -> str:
    """Return the run of all candidates, at least one; refuse several."""
    run_ids = sorted({one.identity.run_id for one in candidates})
    if len(run_ids) > 1:
        raise UsageError(
            f"{where} holds checkpoints of several runs ({', '.join(run_ids)}): name one."
        )
    return run_ids[0]


def _plan_chosen(
    which: str, paths: RunPaths, local: Sequence[Candidate], remote: Sequence[Candidate]
) -> Plan:
    """Return a plan for a name, or for a step or the best of the run that `latest` goes on with."""
    views = read_local_checkpoints(paths.checkpoints)
    others = [*local, *remote]
    if others and parse_checkpoint_name(which) is None:
        run_id = _find_identity(paths, local, remote).run_id
        # One whose manifest cannot be read may be of this run.
        views = [view for view in views if view.manifest is None or view.manifest.run_id == run_id]
        remote = [one for one in remote if one.identity.run_id == run_id]
    try:
        chosen = select_checkpoint(which, views)
    except UsageError:
        if not remote:
            raise
        return _plan_named(which, remote, remote[0].bucket_uri)
    found = next((one for one in local if one.name == chosen.name), None)
    if found is None:
        raise CheckpointError(f"{chosen.name} cannot be used: {chosen.problem}.")
    return _plan_one(found, others)


def _find_identity(
    paths: RunPaths, local: Sequence[Candidate], remote: Sequence[Candidate]
) -> RunIdentity:
    """Return the run and branch that `latest` goes on with; there is at least one candidate.

    Raises:
        UsageError: Nothing is here, and the bucket holds several runs.
    """
    both = [*local, *remote]
    recorded = read_run_identity(paths)
    if recorded is not None and any(one.identity.run_id == recorded.run_id for one in both):
        return recorded
    if local:
        run_id = max(local, key=lambda one: one.name).identity.run_id
    else:
        run_id = _require_one_run(remote, remote[0].bucket_uri)
    return _newest_branch([one for one in both if one.identity.run_id == run_id])


def _local_candidates(directory: Path) -> list[Candidate]:
    found = []
    for name in find_checkpoints(directory):
        path = directory / str(name)
        try:
            identity = read_manifest(path).identity
        except CheckpointError as exc:
            log.debug("%s It is passed over.", exc)
        else:
            found.append(Candidate(name, identity, path))
    return found


def _newest_branch(candidates: Iterable[Candidate]) -> RunIdentity:
    newest = max(candidates, key=lambda one: (one.identity.branch, one.name))
    return newest.identity


def _order(candidates: Iterable[Candidate], identity: RunIdentity) -> tuple[Candidate, ...]:
    """Return those of the branch by step, newest first; what is here before what is there."""
    own = [one for one in candidates if identity.includes(one.identity, one.name.step)]
    return tuple(sorted(own, key=lambda one: (one.name, one.path is not None), reverse=True))


def resolve_start(plan: Plan, paths: RunPaths, checkpoint: Path, manifest: Manifest) -> Start:
    """Return where an attempt begins that goes on from a checkpoint: its branch, what is obsolete.

    `latest` goes on with the branch, also where newer checkpoints of it could not be used; a
    checkpoint that was named and is not the newest begins a new branch.
    """
    identity = plan.identity
    here = checkpoint.resolve()
    local = _local_candidates(paths.checkpoints)
    others = [one for one in local if one.path is not None and one.path.resolve() != here]
    if not plan.can_walk_back:
        ahead = (
            one.identity.run_id == manifest.run_id and one.name.step > manifest.step
            for one in others
        )
        identity = manifest.identity
        if plan.is_older or any(ahead):
            identity = identity.fork(manifest.step, _branches_taken(plan, paths, manifest.run_id))
    obsolete = {
        str(name): "its manifest cannot be read" for name in find_checkpoints(paths.checkpoints)
    }
    if here.parent == paths.checkpoints.resolve():
        obsolete.pop(checkpoint.name, None)
    for one in others:
        del obsolete[str(one.name)]
        if one.name.step == manifest.step:
            obsolete[str(one.name)] = "the one that is resumed has its step"
        elif one.identity.run_id != identity.run_id:
            obsolete[str(one.name)] = f"it is of another run, {one.identity.run_id}"
        elif one.name.step > manifest.step or not identity.includes(one.identity, one.name.step):
            obsolete[str(one.name)] = "it is not part of this branch"
    return Start(identity, checkpoint, obsolete)


def _branches_taken(plan: Plan, paths: RunPaths, run_id: str) -> set[int]:
    """Return the branch numbers of a run that are known here or in the plan."""
    here = [*_local_candidates(paths.checkpoints), *_local_candidates(paths.set_aside)]
    identities = [one.identity for one in (*here, *plan.candidates)]
    return {
        branch
        for identity in (*identities, *plan.known, *plan.in_bucket, read_run_identity(paths))
        if identity is not None and identity.run_id == run_id
        for branch in (identity.branch, *(fork[0] for fork in identity.forks))
    }


def fresh_start(plan: Plan, paths: RunPaths) -> Start:
    """Return where an attempt begins that is a new run's first."""
    if plan.searched:
        log.info("There is no checkpoint in %s yet: starting at step 0.", plan.searched)
    names = find_checkpoints(paths.checkpoints)
    return Start(plan.identity, obsolete={str(name): "a new run begins" for name in names})
