"""Preconditions on generations, as query parameters (JSON API) or headers (XML API)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message

from .errors import ApiError


@dataclass(frozen=True)
class Preconditions:
    """What a request demands of the object that exists; generation 0 means "none exists"."""

    generation_match: int | None = None
    generation_not_match: int | None = None
    metageneration_match: int | None = None
    metageneration_not_match: int | None = None

    @classmethod
    def from_query(cls, query: Mapping[str, str], prefix: str = "if") -> Preconditions:
        """Read `ifGenerationMatch` and its siblings; the prefix `ifSource` is for copies."""
        return cls(
            _number(query, prefix + "GenerationMatch"),
            _number(query, prefix + "GenerationNotMatch"),
            _number(query, prefix + "MetagenerationMatch"),
            _number(query, prefix + "MetagenerationNotMatch"),
        )

    @classmethod
    def from_headers(cls, headers: Message) -> Preconditions:
        """Read the XML API's headers."""
        return cls(
            _number(headers, "x-goog-if-generation-match"),
            metageneration_match=_number(headers, "x-goog-if-metageneration-match"),
        )

    def check(self, existing: tuple[int, int] | None, *, reading: bool = False) -> None:
        """Raise 412, or 304 for a "not match" while reading.

        `existing` is (generation, metageneration) of the live object, or None.
        """
        generation, metageneration = existing or (0, None)
        if self.generation_match not in (None, generation):
            raise _unmet(412, "ifGenerationMatch", self.generation_match, generation)
        if self.metageneration_match not in (None, metageneration):
            raise _unmet(412, "ifMetagenerationMatch", self.metageneration_match, metageneration)
        status = 304 if reading else 412
        if self.generation_not_match is not None and self.generation_not_match == generation:
            raise _unmet(status, "ifGenerationNotMatch", self.generation_not_match, generation)
        if metageneration is not None and self.metageneration_not_match == metageneration:
            raise _unmet(status, "ifMetagenerationNotMatch", metageneration, metageneration)


def _number(values: Mapping[str, str] | Message, key: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError as exc:
        raise ApiError(400, f"Invalid value for {key}: {value!r}") from exc


def _unmet(status: int, condition: str, wanted: object, found: object) -> ApiError:
    message = "At least one of the pre-conditions you specified did not hold."
    return ApiError(status, f"{message} {condition}={wanted}, but it is {found}.")
