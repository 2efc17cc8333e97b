"""The sample text that every Python carries: its help topics and long docstrings."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.base.errors import DataError
from utils.corpus.file_kinds import hash_files

SAMPLE_SEED = 20240229
SAMPLE_MIN_CHARACTERS = 200
SAMPLE_MIN_DOCUMENTS = 500
SAMPLE_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo"]
    + ["ensurepip", "__pycache__"]
)


@dataclass(frozen=True)
class SampleSource:
    """Real English text that every Python carries: its help topics and long docstrings.

    About 2,300 documents and 1.7 MB, in an order shuffled with a fixed seed so that every shard
    gets a bit of everything. Modules are parsed, never imported.
    """

    stdlib: Path = Path(sysconfig.get_path("stdlib"))
    """Folder of the library's sources."""

    share: tuple[int, int] = (0, 1)
    """Which part it is, from 0, and of how many."""

    holds_tokens = False

    def documents(self) -> Iterator[str]:
        """Yield the sample documents.

        Raises:
            DataError: There are no library sources with docstrings.
        """
        number, count = self.share
        yield from _collect_sample(self.stdlib)[number::count]

    def part(self, number: int, count: int) -> SampleSource:
        """As `Source` says."""
        return dataclasses.replace(self, share=(number, count))

    def outline(self) -> list[Any]:
        """As `Source` says."""
        return [self.fingerprint()]

    def fingerprint(self) -> str:
        """Return a hash over the library's source files."""
        files = [*_modules(self.stdlib), self.stdlib / "pydoc_data" / "topics.py"]
        return hash_files("sample", [path for path in files if path.is_file()])

    def uses(self, option: str) -> bool:
        """As `Source` says."""
        return option == "token_cache"


@functools.cache
def _collect_sample(stdlib: Path) -> list[str]:
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    documents += [text for path in _modules(stdlib) for text in _long_docstrings(path)]
    if len(documents) < SAMPLE_MIN_DOCUMENTS:
        raise DataError(
            f"{stdlib} has only {len(documents)} sample documents, at least "
            f"{SAMPLE_MIN_DOCUMENTS} are needed: this Python was installed without its library "
            "sources. Use another Python, or your own text with --input."
        )
    random.Random(SAMPLE_SEED).shuffle(documents)  # noqa: S311 - not a secret
    return documents


def _modules(stdlib: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(stdlib):
        folders[:] = [
            name
            for name in folders
            if name not in SAMPLE_SKIPPED_FOLDERS and not name.startswith("config-")
        ]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(stdlib).parts)


def _long_docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings(action="ignore"):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            # A module for another Python, or a template: the sample does without it.
            return
    for node in _definitions(tree):
        text = ast.get_docstring(node) or ""
        if len(text) >= SAMPLE_MIN_CHARACTERS:
            yield text


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    # Statements only: ast.walk would visit every expression too, for twice the time.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            nodes += getattr(node, block, ())
