"""One page of an object listing: a pure function over the sorted names of a bucket."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import ApiError


@dataclass(frozen=True)
class ListQuery:
    """What is asked for; `start_offset` is inclusive, `end_offset` exclusive."""

    prefix: str = ""
    delimiter: str = ""
    start_offset: str = ""
    end_offset: str = ""
    page_token: str = ""
    max_results: int = 1000
    include_trailing_delimiter: bool = False

    @classmethod
    def from_query(cls, query: Mapping[str, str], max_page_size: int) -> ListQuery:
        """Read query parameters; the server's own page size is the upper limit."""
        try:
            asked = int(query.get("maxResults") or max_page_size)
        except ValueError as exc:
            raise ApiError(400, f"Invalid maxResults: {query['maxResults']!r}") from exc
        return cls(
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            start_offset=query.get("startOffset", ""),
            end_offset=query.get("endOffset", ""),
            page_token=query.get("pageToken", ""),
            max_results=max(1, min(asked, max_page_size)),
            include_trailing_delimiter=query.get("includeTrailingDelimiter") == "true",
        )


@dataclass(frozen=True)
class Entry:
    """One entry of a listing: a name, or a prefix that stands for all names below it."""

    text: str
    is_prefix: bool

    def covers(self, name: str) -> bool:
        """Whether a listing that has come to this entry is past the name."""
        return name <= self.text or (self.is_prefix and name.startswith(self.text))


@dataclass
class Page:
    """Names and prefixes of one page, and the token of the next one, if there is one."""

    names: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    next_token: str = ""


def list_page(names: Iterable[str], query: ListQuery) -> Page:
    """Build a page; names and prefixes together count against `max_results`."""
    page = Page()
    after = _decode_token(query.page_token) if query.page_token else Entry("", is_prefix=False)
    for name in sorted(names):
        folder = _folder_of(name, query)
        entry = Entry(folder or name, is_prefix=bool(folder))
        if not _is_wanted(name, query) or after.covers(name):
            continue
        if len(page.names) + len(page.prefixes) >= query.max_results:
            page.next_token = _encode_token(after)
            return page
        after = entry
        (page.prefixes if folder else page.names).append(entry.text)
        if query.include_trailing_delimiter and name == folder:
            page.names.append(name)
    return page


def _is_wanted(name: str, query: ListQuery) -> bool:
    if not name.startswith(query.prefix) or name < query.start_offset:
        return False
    return not query.end_offset or name < query.end_offset


def _folder_of(name: str, query: ListQuery) -> str:
    """The prefix that stands for the name, or the empty string if it is listed itself."""
    if not query.delimiter:
        return ""
    end = name.find(query.delimiter, len(query.prefix))
    return name[: end + len(query.delimiter)] if end >= 0 else ""


def _encode_token(entry: Entry) -> str:
    text = ("p" if entry.is_prefix else "n") + entry.text
    return base64.urlsafe_b64encode(text.encode()).decode()


def _decode_token(token: str) -> Entry:
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode()
    except (binascii.Error, UnicodeError) as exc:
        raise ApiError(400, f"Invalid pageToken: {token!r}") from exc
    return Entry(text[1:], is_prefix=text[:1] == "p")
