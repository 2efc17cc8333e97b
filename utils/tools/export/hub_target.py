"""A repository of the Hugging Face Hub, as the place that an exported model goes to.

    staging directory (files written, checked) -> commit -> https://huggingface.co/OWNER/NAME

The token is taken from where `huggingface_hub` looks for it (HF_TOKEN, `hf auth login`), and tried
before anything costs time. Nothing is replaced unless asked; the history keeps what was there.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import AccessDeniedError, StorageError, UsageError
from utils.base.files import scratch_directory
from utils.base.progress import OnProgress
from utils.base.text import printable
from utils.tools.export.target import SCRATCH_PREFIX, is_export_file

HUB_PREFIX = "hub:"
COMMIT_MESSAGE = "Upload model"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KEPT = ".gitattributes"


@dataclass(frozen=True)
class HubTarget:
    """A model repository.

    Attributes:
        location: What a user calls it, `hub:OWNER/NAME`.
        is_whole: The files are all of a model; others of an earlier one are removed.
        overwrite: Commit to a repository that has files.
        is_private: Whether a repository that is made here is private.
    """

    location: str
    scratch: Path
    is_whole: bool
    overwrite: bool
    is_private: bool

    def __post_init__(self) -> None:
        """Refuse what is no name of a repository."""
        if not _REPOSITORY.fullmatch(self.repository):
            raise UsageError(f"--output {printable(self.location)}: give hub:OWNER/NAME.")

    @property
    def repository(self) -> str:
        """`OWNER/NAME`."""
        return self.location.removeprefix(HUB_PREFIX)

    def require_free(self) -> None:
        """Refuse a Hub that cannot be reached, no token, or a repository that has files."""
        api = self._api()
        with self._mapped_errors():
            api.whoami()
            names = [name for name in self._names_there(api) if name != _KEPT]
        if names and not self.overwrite:
            raise UsageError(
                f"{self.location} holds {printable(names[0])} already ({len(names)} files). Choose "
                "another name, or add --overwrite: its history keeps what is there."
            )

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """Return an empty directory on this machine, which is gone afterwards."""
        return scratch_directory(self.scratch, SCRATCH_PREFIX)

    def publish(self, staged: Path, on_progress: OnProgress) -> None:
        """Commit the files at once; those of an earlier model that this one lacks are removed."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self.require_free()  # something may have come there while the model was written
        api = self._api()
        paths = sorted(staged.iterdir())
        new = {path.name for path in paths}
        operations: list[Any] = [CommitOperationAdd(path.name, str(path)) for path in paths]
        with self._mapped_errors():
            api.create_repo(self.repository, private=self.is_private or None, exist_ok=True)
            there = self._names_there(api) if self.is_whole else []
            stale = [name for name in there if is_export_file(name) and name not in new]
            operations += [CommitOperationDelete(name) for name in stale]
            # One commit and not upload_folder, which may make several of a large folder.
            api.create_commit(self.repository, operations, commit_message=COMMIT_MESSAGE)

    def _names_there(self, api: Any) -> list[str]:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return [one.rfilename for one in api.repo_info(self.repository).siblings or ()]
        except RepositoryNotFoundError:
            return []

    def _api(self) -> Any:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars

        # Its retries without a network, each said twice: the error at the end says it once.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if huggingface_hub.get_token() is None:
            raise UsageError(
                f"{self.location} needs a token: set HF_TOKEN, or run `hf auth login`. One that "
                "may write comes from https://huggingface.co/settings/tokens."
            )
        if not sys.stderr.isatty():
            disable_progress_bars()
        return huggingface_hub.HfApi()

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # huggingface_hub, its HTTP client and hf_xet: many families
            status = getattr(getattr(exc, "response", None), "status_code", None)
            lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
            reason = printable(" ".join(lines[:2])).rstrip(".") or type(exc).__name__
            if status in (401, 403):
                raise AccessDeniedError(
                    f"{self.location}: the token is not valid or may not write there ({reason})."
                ) from exc
            raise StorageError(f"{self.location}: {reason}. Run the same command again.") from exc
