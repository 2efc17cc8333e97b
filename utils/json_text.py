"""JSON that may be torn, foreign or nested without end: a value, or one kind of error.

Every file, object and line of this project that holds JSON is read through here.
"""

from __future__ import annotations

import json
from typing import Any

# Raised on the way from parsed JSON to a value of ours, where another writer wrote it: other types,
# missing keys, infinite numbers, or so deep that str() gives up.
FOREIGN_ERRORS = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


def parse_json(text: bytes | str, **options: Any) -> Any:
    """Return the value of JSON text.

    Args:
        text: UTF-8 where it is bytes.
        **options: Of `json.loads`.

    Raises:
        ValueError: It is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_object(text: bytes | str, **options: Any) -> dict[str, Any]:
    """Return the JSON object that text holds.

    Raises:
        ValueError: Of `parse_json`, or it is another value.
    """
    value = parse_json(text, **options)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
