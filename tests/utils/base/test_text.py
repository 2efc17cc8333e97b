"""JSON text: a value, or one kind of error. Lines that fit a width."""

from __future__ import annotations

import math
import shlex
import subprocess

import pytest

from tests.sample_json import UNREADABLE
from utils.base.text import epoch_seconds, parse_json_object, perplexity_of, wrap_command


@pytest.mark.parametrize("text", [b'{"a": [1, NaN]}', '{"a": [1, NaN]}'])
def test_an_object_is_what_it_says(text: bytes | str) -> None:
    found = parse_json_object(text)
    assert list(found) == ["a"]
    assert found["a"][0] == 1
    assert found["a"][1] != found["a"][1]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_whatever_is_wrong_is_one_kind_of_error(kind: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json_object(UNREADABLE[kind])


@pytest.mark.parametrize("time", [None, 7, "soon", "9999-99-99", ["2026"], {}])
def test_a_time_that_is_none_is_none(time: object) -> None:
    assert epoch_seconds(time) is None
    assert epoch_seconds("1970-01-01T00:00:10") == 10.0  # without a zone: UTC


def test_perplexity_never_overflows() -> None:
    assert math.isfinite(perplexity_of(1e300))
    assert math.isnan(perplexity_of(math.nan))


@pytest.mark.parametrize("width", [30, 60, 500])
def test_a_command_in_lines_is_the_command_to_a_shell(width: int) -> None:
    words = ["python", "/home/a user/train.py", "--set", "run_name=it's mine", "--resume", "latest"]
    lines = wrap_command(shlex.join(words), width)
    assert max(map(len, lines)) <= width
    assert (len(lines) > 1) == (width < 500)
    shown = subprocess.run(
        ["/bin/sh", "-c", "printf '%s\\n' " + "\n".join(lines)],
        capture_output=True,
        check=True,
        text=True,
    )
    assert shown.stdout.splitlines() == words
