"""JSON that is there and cannot be read: never the same as none."""

from __future__ import annotations

UNREADABLE = {
    "torn": b'{"format": 1, "shards": [{"na',
    "nested deeply": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "no object": b"[1]",
    "empty": b"",
}
