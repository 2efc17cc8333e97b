"""How an attempt of a run ends: last uploads, messages, exit code.

request to stop or last step -> last save -> uploads, verified -> exit code
"""

from __future__ import annotations

import contextlib
import logging
import shlex

import torch

from utils.base import ranks
from utils.base.console import PLAIN_LINE, LiveLine
from utils.base.errors import CheckpointError, ExitCode, PretrainError
from utils.base.text import count_of, format_duration
from utils.checkpoints.layout import read_manifest
from utils.command_line.next_command import NextCommand
from utils.run.grace import describe_outcome, describe_plan
from utils.run.saving import RunSaving

log = logging.getLogger("train")


def tell_plan(saving: RunSaving, remaining_seconds: float) -> None:
    """Say what the grace period is enough for; on the main process."""
    uploader = saving.uploader
    if uploader is None:
        seconds = max(0.0, remaining_seconds)
        log.info("%.0f s of grace: saving on this disk; uploading is off.", seconds)
        return
    pending = []
    for path in uploader.pending_paths:
        with contextlib.suppress(CheckpointError):  # one that was given up is gone
            pending.append((path.name, read_manifest(path).total_bytes))
    plan = describe_plan(
        remaining_seconds,
        saving.saver.last_seconds,
        saving.snapshot_bytes,
        uploader.bytes_per_second,
        sorted(pending, key=lambda item: item[0]),
    )
    log.info("%s", plan)


def wait_for_uploads(
    saving: RunSaving, live: LiveLine, upload_seconds: float, *, is_leaving: bool
) -> ExitCode:
    """Wait for the save in progress and for uploads; say what is not in the bucket.

    The time that a request to stop leaves ends the wait, also where it comes in the meantime. The
    live line goes before the last messages.
    `is_leaving` says that one has come: then what is left is normal.

    Raises:
        SaveError: The last save failed.
    """
    saver, uploader = saving.saver, saving.uploader
    while not saver.wait(0.5):
        live.show("writing the checkpoint")
    saved = saver.last_committed
    if uploader is None:
        live.close()
        if saver.failure is not None:
            raise saver.failure
        if is_leaving and saved is not None:
            log.info("Saved %s on this disk; uploading is off.", saved)
        return ExitCode.DONE
    if uploader.pending:
        log.info(
            "Waiting up to %s for %s.",
            format_duration(upload_seconds),
            count_of(len(uploader.pending), "upload"),
        )
    left = uploader.drain(upload_seconds, live.show, saving.must_leave)
    live.close()  # what follows stays on the screen
    is_leaving = is_leaving or saving.must_leave()
    saving.apply_retention()
    missing = list(dict.fromkeys([*left, *uploader.failures]))
    if is_leaving:
        log.info("%s", describe_outcome(str(saved) if saved else None, uploader.verified, missing))
    if saver.failure is not None:
        raise saver.failure
    if not missing:
        return ExitCode.DONE
    if not is_leaving:
        _report_missing(saving, left, missing)
    return ExitCode.NOT_VERIFIED


def _report_missing(saving: RunSaving, left: list[str], missing: list[str]) -> None:
    for name in left:
        log.error("%s was not uploaded before the deadline.", name)
    folder = saving.paths.checkpoints
    kept = [name for name in missing if (folder / name).is_dir()]
    log.error(
        "Not verified in the bucket: %s. Kept in %s: %s. To upload them:",
        count_of(len(missing), "checkpoint"),
        folder,
        ", ".join(kept) or "none",
    )
    command = f"python scripts/upload_manager.py upload-all --run {shlex.quote(str(folder))}"
    log.error("%s", command, extra={PLAIN_LINE: True})


def find_failure(own: PretrainError | None) -> PretrainError | None:
    """Return this rank's failure, on the main process that of any rank; all ranks call this."""
    gathered = ranks.gather_to_main(own and (str(own), own.exit_code))
    if own is not None or gathered is None:
        return own
    told = next((failure for failure in gathered if failure), None)
    if told is None:
        return None
    error = PretrainError(told[0])
    error.exit_code = told[1]
    return error


def conclude(
    code: ExitCode, reason: str | None, step: int, max_steps: int, command: NextCommand
) -> ExitCode:
    """Say how an attempt without an error has ended, and what goes on; return its exit code.

    `reason` is what asked for the stop, None where nothing has.
    """
    if step >= max_steps and (code is ExitCode.DONE or reason is None):
        of = f" of {max_steps}" if step == max_steps else f"; max_steps is {max_steps}"
        log.info("Done: step %d%s.", step, of)
        show_command(f"To train on to step {2 * step}:", command.text(2 * step))
    elif reason is not None:
        what = "saved" if step else "nothing was trained yet"
        show_command(f"Stopped by {reason} at step {step}, {what}. Go on with:", command.text())
        return ExitCode.STOPPED
    else:
        show_command(f"Ended after step {step} as asked. Go on with:", command.text())
    return code


def show_command(text: str, command: str) -> None:
    """Say how an attempt has ended, and on a line of its own the command that goes on."""
    log.info("%s", text)
    log.info("%s", command, extra={PLAIN_LINE: True})


def describe_shortage(error: BaseException | None) -> str | None:
    """Return what to change where an error means that memory is short, else None."""
    is_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if not is_host and not isinstance(error, torch.OutOfMemoryError):
        return None
    where = "host memory" if is_host else "GPU memory"
    return (
        f"Out of {where}. Lower per_device_train_batch_size (global_batch_size keeps the step's "
        "size), set gradient_checkpointing=true, or choose a smaller model. Steps since the last "
        "checkpoint are lost. Go on with:"
    )
