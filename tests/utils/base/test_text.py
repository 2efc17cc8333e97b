"""JSON text: a value, or one kind of error."""

from __future__ import annotations

import pytest

from tests.sample_json import UNREADABLE
from utils.base.text import parse_json, parse_json_object


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


def test_other_values_are_values() -> None:
    assert parse_json(b"[1]") == [1]
    assert parse_json("1.5", parse_float=str) == "1.5"
