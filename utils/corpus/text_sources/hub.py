"""Datasets of the Hugging Face Hub, and those that `datasets` has saved on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import DataError, first_line
from utils.base.files import walk_folders
from utils.corpus.file_kinds import DEFAULT_COLUMN, file_sizes, hash_files
from utils.corpus.text_sources.records import numbered_rows, require_column, texts_of_records

# What `save_to_disk` of a Dataset and of a DatasetDict writes.
SAVED_FILES = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class HubSource:
    """A text column of a Hugging Face dataset, by name or local directory."""

    name: str
    """Name on the hub (`HuggingFaceFW/fineweb-edu`) or a local directory."""

    split: str = "train"
    """Split or slice of it, as `datasets` writes them (`train[:1%]`)."""

    configuration: str | None = None
    """Named subset of the dataset."""

    text_column: str = DEFAULT_COLUMN
    """Column of the text."""

    streaming: bool = False
    """Read over the network as needed; for what does not fit the disk."""

    share: tuple[int, int] = (0, 1)
    """Which part it is, from 0, and of how many."""

    holds_tokens = False

    def documents(self) -> Iterator[str]:
        """Yield the documents of the split.

        Raises:
            DataError: The dataset, split or column cannot be read.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self._open()
        if self.share[0] >= getattr(rows, "num_rows", math.inf):  # `datasets` makes no empty part
            return
        rows = split_dataset_by_node(rows, *self.share)
        if rows.column_names is not None:  # a stream may not know them
            require_column(self.text_column, rows.column_names, self._place)
            rows = rows.select_columns([self.text_column])
        place = self._place
        yield from texts_of_records(numbered_rows(rows, place), self.text_column, place)

    def fingerprint(self) -> str:
        """Return a hash of the names, and of a local directory's files.

        A dataset that changes on the hub under its name is not noticed.
        """
        names = [self.name, self.configuration, self.split, self.text_column]
        directory = Path(self.name).expanduser()
        if directory.is_dir():
            names[0] = "directory"
            files = (path / name for path, _, found in walk_folders(directory) for name in found)
            return hash_files(json.dumps(names), sorted(file for file in files if file.is_file()))
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def uses(self, option: str) -> bool:
        """As `Source` says.

        Raises:
            DataError: The dataset cannot be read.
        """
        if option == "split" and self._is_saved("state.json"):
            return str(self._open().split) == self.split
        if option == "hf_config" and self._is_saved(*SAVED_FILES):
            return False
        return option not in ("document_per", "document_separator", "eos_id", "token_dtype")

    def part(self, number: int, count: int) -> HubSource:
        """As `Source` says: as `datasets` divides them among nodes."""
        return dataclasses.replace(self, share=(number, count))

    def outline(self) -> list[Any]:
        """As `Source` says."""
        directory = Path(self.name).expanduser()
        name = file_sizes([directory]) if directory.is_dir() else self.name
        return [name, self.configuration, self.split, self.text_column]

    def _is_saved(self, *names: str) -> bool:
        directory = Path(self.name).expanduser()
        return any((directory / name).is_file() for name in names)

    @property
    def _place(self) -> str:
        return f"--hf {self.name} --split {self.split}"

    def _open(self) -> Any:
        import datasets

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            if self._is_saved(*SAVED_FILES):  # memory-mapped, so streaming changes nothing
                saved = datasets.load_from_disk(str(Path(self.name).expanduser()))
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(
                self.name, self.configuration, split=self.split, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as exc:
            raise DataError(f"{self._place}: cannot be loaded ({first_line(exc)}).") from exc
