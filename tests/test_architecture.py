"""What import-linter does not know: the list of folders, their size, what starts quickly.

The rule of imports stands in pyproject.toml (`make lint`); ARCHITECTURE.md has the picture.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter

from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_python

MOST_MODULES = 12
UTILS = PROJECT_DIRECTORY / "utils"
# All but the benchmarks, which measure training; and the process that uploads beside a trainer.
COMMANDS = [
    *(f"scripts.{path.stem}" for path in sorted((PROJECT_DIRECTORY / "scripts").glob("[a-z]*.py"))),
    "debug_gpu",
    "train",
    "utils.uploads.process",
]
COMMANDS.remove("scripts.benchmark")
HEAVY = ("torch", "transformers", "accelerate", "matplotlib")


def listed_rooms() -> list[str]:
    """Return the rooms as pyproject.toml has them, the last in the list first."""
    settings = tomllib.loads((PROJECT_DIRECTORY / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [room.strip() for layer in layers for room in layer.split(":")]


def test_every_folder_has_its_place_in_the_list() -> None:
    files = {path for path in UTILS.iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms = {f"utils.{path.stem}" for path in files if not path.name.startswith("__")}
    assert set(listed_rooms()) == {*rooms, "configs"}


def test_no_folder_has_more_modules_than_one_can_look_over() -> None:
    modules = [path for path in UTILS.rglob("*.py") if path.name != "__init__.py"]
    sizes = Counter(str(path.parent.relative_to(UTILS)) for path in modules)
    assert {folder: size for folder, size in sizes.items() if size > MOST_MODULES} == {}


def test_what_the_page_says_is_in_a_file_is_in_it() -> None:
    page = (PROJECT_DIRECTORY / "ARCHITECTURE.md").read_text("utf-8")
    said = re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", page)
    assert len(said) > 10
    for name, file in said:
        path = next(root / file for root in (UTILS, PROJECT_DIRECTORY) if (root / file).is_file())
        assert re.search(rf"\b{name.split('.')[-1]}\b", path.read_text("utf-8")), (name, file)


def test_commands_start_without_what_takes_seconds_to_load() -> None:
    code = (
        "import importlib, sys\n"
        "for command in sys.argv[1:]:\n"
        "    importlib.import_module(command)\n"
        f"    heavy = {set(HEAVY)} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{command} loads {heavy}')\n"
    )
    started = run_python("-c", code, *COMMANDS)
    assert started.returncode == 0, started.stderr
