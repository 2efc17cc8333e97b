"""One name means one thing: no public name of configs and utils is defined in two modules."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from configs.config_files import PROJECT_DIRECTORY

# What each module has for itself: its logger, and the entry of a process.
OF_EACH_MODULE = {"log", "main", "serve", "T"}


def public_names(file: Path) -> set[str]:
    """Return the functions, classes and variables that a module defines."""
    found: set[str] = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                name.id
                for target in targets
                for name in ast.walk(target)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return {name for name in found if not name.startswith("_")} - OF_EACH_MODULE


def test_every_public_name_is_defined_once() -> None:
    places = defaultdict(list)
    for folder in ("configs", "utils"):
        for file in sorted((PROJECT_DIRECTORY / folder).rglob("*.py")):
            for name in public_names(file):
                places[name].append(str(file.relative_to(PROJECT_DIRECTORY)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
