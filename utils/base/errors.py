"""The errors a user can meet, and the exit code of each.

    PretrainError                1   unexpected, or not covered below
    |- UsageError                2   the command line or a name in it
    |- ConfigError               2   a configuration file, key or value
    |- DataError                 2   training data that cannot be used
    |  `- ShardError             2   one shard, named, with its reason
    |- CheckpointError           2   a checkpoint that cannot be used
    |  `- UnreadableCheckpointError  2   because its files are damaged or missing
    |- SaveError                 1   a checkpoint could not be written
    |- DivergenceError           1   the loss or the gradients were no longer usable
    |- ResourceShortageError     1   out of device or host memory
    |- LockedError               2   another process already works here
    |- PreflightError            3   the machine or the bucket cannot do this run
    |- UploadError               4   trained and saved, but not all of it verified in the bucket
    `- StorageError              1   a bucket operation failed
       |- ObjectNotFoundError    1   no such bucket or object
       |- AccessDeniedError      1   401 or 403
       |- ConflictError          1   a precondition failed: the object is not the one expected
       `- TransientStorageError  1   worth trying again (429, 5xx, connection lost)

Every message says what failed, the value, the limit and what to do next; it is shown as it is,
without a traceback. Nothing is imported here, so that every other module may import this one.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command of this project."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    PREFLIGHT = 3
    NOT_VERIFIED = 4
    STOPPED = 75
    SIGNAL_BASE = 128


class PretrainError(Exception):
    """Root of the errors whose message is meant for the user."""

    exit_code: ExitCode = ExitCode.UNEXPECTED


class UsageError(PretrainError):
    """The command line asks for something that does not exist or does not fit."""

    exit_code = ExitCode.USAGE


class ConfigError(PretrainError):
    """A configuration file, key or value is wrong."""

    exit_code = ExitCode.USAGE


class DataError(PretrainError):
    """The training data cannot be used as it is."""

    exit_code = ExitCode.USAGE


class ShardError(DataError):
    """One shard cannot be used."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class CheckpointError(PretrainError):
    """A checkpoint is missing, incomplete, damaged or foreign."""

    exit_code = ExitCode.USAGE


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint's files are damaged or missing: an older one may do."""


class SaveError(PretrainError):
    """A checkpoint could not be written; older ones are intact."""


class DivergenceError(PretrainError):
    """Training was ended because its loss or gradients were no longer usable."""


class ResourceShortageError(PretrainError):
    """The device's or the host's memory does not suffice."""


class LockedError(PretrainError):
    """Another live process holds the directory or prefix."""

    exit_code = ExitCode.USAGE


class PreflightError(PretrainError):
    """The run cannot succeed on this machine or with this bucket."""

    exit_code = ExitCode.PREFLIGHT


class UploadError(PretrainError):
    """Something that was to be in the bucket is not there, or not verified."""

    exit_code = ExitCode.NOT_VERIFIED


class StorageError(PretrainError):
    """A bucket operation failed for good."""


class ObjectNotFoundError(StorageError):
    """There is no such bucket or object."""


class AccessDeniedError(StorageError):
    """The credentials do not allow the operation."""


class ConflictError(StorageError):
    """A precondition failed: the object in the bucket is not the expected one."""


class TransientStorageError(StorageError):
    """The operation may succeed when it is tried again."""


def first_line(value: object) -> str:
    """Return the first line that says something, the type's name where none does."""
    lines = [line.strip() for line in str(value).splitlines() if line.strip()]
    return lines[0] if lines else type(value).__name__
