"""What commands show in a terminal of a width, in this process, and whether it fits."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

from utils.base import console
from utils.base.text import cell_width

WIDTHS = (60, 80, 100)
_STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
# Notes below a table: their words are not the table's.
_NOTES = re.compile(
    r"^(Not shown in this width:[^.]*\.|Each [\w ]+ begins\s+with\s+\S+)$", re.MULTILINE
)


def read_screen(
    show: Callable[[], object],
    columns: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Return what `show` prints in a terminal of so many columns, or in a pipe (None)."""
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(console, "_shared_consoles", {})  # each has the width of its terminal
        patch.setenv("TERM", "dumb")
        if columns is not None:
            patch.setenv("COLUMNS", str(columns))
            patch.setattr(type(sys.stdout), "isatty", lambda self: True)
        show()
    return capsys.readouterr().out


def find_misfits(narrow: str, wide: str, columns: int) -> list[str]:
    """Return what is wrong with a text in a terminal, of which `wide` is the text in a wide one."""
    narrow, wide = (_STEERING.sub("", text) for text in (narrow, wide))
    wrong = [f"too long: {line}" for line in narrow.splitlines() if cell_width(line) > columns]
    wrong += [f"blanks at the end: {line!r}" for line in narrow.splitlines() if line.endswith(" ")]
    whole = set(wide.split())
    for word in _NOTES.sub("", narrow).split():
        is_end = any(re.search(f"[-/]{re.escape(word)}$", one) for one in whole)
        is_other = "..." in word or re.fullmatch(r"[\[#.\]]+|[\d:]{8}|\\", word)  # bars, clocks
        if word not in whole and not is_end and not is_other:
            wrong.append(f"broken: {word}")
    return wrong
