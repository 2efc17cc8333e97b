"""A stand-in for the package `modal`: the names that cloud/modal_app.py uses.

A volume is a directory. A slow test imports the app with the real package, which then sees what the
image, the app and its functions are given, and compares the arguments of what is called later.
"""

from __future__ import annotations

import contextlib
import enum
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class NotFoundError(Exception):
    pass


class FileEntryType(enum.IntEnum):
    FILE = 1
    DIRECTORY = 2


@dataclass(frozen=True)
class FileEntry:
    path: str
    type: FileEntryType
    mtime: int
    size: int


@dataclass(frozen=True)
class Secret:
    name: str

    @staticmethod
    def from_name(name: str) -> Secret:
        return Secret(name)


class Image:
    """Every call on it is written down."""

    def __init__(self, steps: tuple[Any, ...] = ()) -> None:
        self.steps = steps

    def __getattr__(self, name: str) -> Callable[..., Image]:
        return lambda *words, **options: Image((*self.steps, (name, words, options)))


@dataclass
class Volume:
    """A volume whose files are those of a directory."""

    name: str = "volume"
    create_if_missing: bool = False
    root: Path = Path()
    commits: int = 0

    @staticmethod
    def from_name(name: str, *, create_if_missing: bool = False) -> Volume:
        return Volume(name, create_if_missing)

    def commit(self) -> None:
        self.commits += 1

    def iterdir(self, path: str, *, recursive: bool = True) -> Iterator[FileEntry]:
        start = self._local(path)
        if not start.exists():
            raise NotFoundError(path)
        found = sorted(start.rglob("*") if recursive else start.iterdir())
        for one in found if start.is_dir() else [start]:
            kind = FileEntryType.DIRECTORY if one.is_dir() else FileEntryType.FILE
            facts = one.stat()
            size = 0 if one.is_dir() else facts.st_size
            yield FileEntry(one.relative_to(self.root).as_posix(), kind, int(facts.st_mtime), size)

    def read_file(self, path: str) -> Iterator[bytes]:
        data = self._local(path).read_bytes()
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    def remove_file(self, path: str, recursive: bool = False) -> None:
        target = self._local(path)
        if target.is_dir():
            assert recursive
            shutil.rmtree(target)
        else:
            target.unlink()

    @contextlib.contextmanager
    def batch_upload(self, force: bool = False) -> Iterator[Batch]:
        yield Batch(self, force)

    def _local(self, path: str) -> Path:
        assert ".." not in Path(path).parts
        return self.root / path.lstrip("/")


@dataclass
class Batch:
    volume: Volume
    force: bool

    def put_file(self, local_file: str, remote_path: str) -> None:
        target = self.volume._local(remote_path)
        if target.exists() and not self.force:
            raise FileExistsError(remote_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local_file, target)

    def put_directory(self, local_path: str, remote_path: str, recursive: bool = True) -> None:
        assert recursive
        for path in sorted(Path(local_path).rglob("*")):
            if path.is_file():
                self.put_file(str(path), f"{remote_path}/{path.relative_to(local_path)}")


@dataclass
class Function:
    """A function of the app: its options, and the calls that were made."""

    function: Callable[..., Any]
    options: dict[str, Any]
    calls: list[tuple[dict[str, Any], tuple[Any, ...]]]
    answer: list[Any]

    def with_options(
        self,
        *,
        cpu: Any = None,
        memory: Any = None,
        gpu: str | None = None,
        secrets: Any = None,
        timeout: int | None = None,
    ) -> Function:
        given = {"cpu": cpu, "memory": memory, "gpu": gpu, "secrets": secrets, "timeout": timeout}
        options = {**self.options, **{key: value for key, value in given.items() if value}}
        return Function(self.function, options, self.calls, self.answer)

    def remote(self, *words: Any) -> Any:
        self.calls.append((self.options, words))
        return self.answer[0]


@dataclass
class App:
    name: str
    functions: dict[str, Function] = field(default_factory=dict)
    entrypoints: dict[str, Callable[..., None]] = field(default_factory=dict)

    def function(self, **options: Any) -> Callable[[Callable[..., Any]], Function]:
        def register(function: Callable[..., Any]) -> Function:
            self.functions[function.__name__] = Function(function, options, [], [0])
            return self.functions[function.__name__]

        return register

    def local_entrypoint(self) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def register(function: Callable[..., None]) -> Callable[..., None]:
            self.entrypoints[function.__name__] = function
            return function

        return register


def build_module() -> ModuleType:
    """Return what `import modal` gives."""
    module = ModuleType("modal")
    names = {
        "App": App,
        "Image": Image(),
        "Retries": SimpleNamespace,
        "Secret": Secret,
        "Volume": Volume,
        "exception": SimpleNamespace(NotFoundError=NotFoundError),
        "is_local": lambda: True,
    }
    for name, value in names.items():
        setattr(module, name, value)
    return module
