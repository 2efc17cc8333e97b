"""What a user calls a place: a bucket such as `gs://bucket/prefix`, or a path on this machine.

Everything else that looks like an address, such as `gs:/bucket` or `s3://bucket`, is refused: taken
for a directory, it would silently be created and written to. Everything that reads the name of a
place asks here. Only errors are imported, so that the configuration can import this.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from utils.base.errors import UsageError

BUCKETS = {"gs": "utils.storage.gcs:GcsBucket"}
"""Scheme -> module and class of its buckets. Another kind of bucket is a file and a line here."""
BUCKET_PLACES = ", ".join(f"{scheme}://bucket/prefix" for scheme in BUCKETS)
PLACES = f"{BUCKET_PLACES} or a directory"
LOCAL_PLACES = "a path on this machine"
_OTHER_NAMES = {"gcs": "gs"}  # of schemes
# `s3//bucket` may be a directory, unless what comes before the slashes is a known scheme.
_KNOWN_SCHEMES = frozenset({*_OTHER_NAMES, "s3", "http", "https", "file"})
_BEGINNING = re.compile(r"\s*([^/\\:]*)(:?[/\\]*)(.*)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z]+[0-9]?")


def scheme_of(uri: str) -> str | None:
    """Return the scheme of a bucket's URI, None of a path on this machine."""
    scheme, mark, _ = uri.partition("://")
    return scheme if mark and scheme in BUCKETS else None


def local_path(uri: str) -> Path | None:
    """Return the path on this machine that a place is, None where it is a bucket elsewhere."""
    return Path(uri).expanduser() if scheme_of(uri) is None else None


def split_uri(uri: str) -> tuple[str, str] | None:
    """Return where a place lies and its name there; None for a whole bucket and the root."""
    path = local_path(uri)
    if path is not None:
        path = path.absolute()
        return (str(path.parent), path.name) if path.name else None
    parent, _, name = uri.rstrip("/").rpartition("/")
    return (parent, name) if scheme_of(parent) is not None else None


def join_uri(uri: str, *names: str) -> str:
    """Append object names to a bucket URI; empty names are left out."""
    base = uri if uri.endswith("://") else uri.rstrip("/")
    return "/".join([base, *(name.strip("/") for name in names if name)])


def normalize_uri(uri: str) -> str:
    """Return the one spelling of a bucket URI: directories absolute, no slash at the end."""
    path = local_path(uri)
    return uri.rstrip("/") if path is None else str(path.absolute())


def find_mistake(text: str, places: str = PLACES) -> str | None:
    """Return what is wrong with the name of a place, None where nothing is.

    A directory whose name begins like an address is reached by `./NAME`.

    `places` is what it may be; a bucket only where this says so.
    """
    is_local = places == LOCAL_PLACES
    scheme = scheme_of(text)
    if scheme is not None and not text.startswith(f"{scheme}:///"):
        return f"{text}: give {places}." if is_local else None
    found = _BEGINNING.fullmatch(text)
    assert found is not None
    name, mark, rest = found.groups()
    if PurePath(text).drive or not _is_address(name.strip(), mark):  # a drive is one on Windows
        return None
    suggestion = "" if is_local else _suggest(name.strip().lower(), rest.replace("\\", "/"))
    message = f"{text}: did you mean {suggestion}?" if suggestion else f"{text}: give {places}."
    if os.path.lexists(text) or (not suggestion and not mark.startswith(("://", "//"))):
        message += f" For a directory of that name, write ./{text}"
    return message


def require_place(text: str, option: str = "", places: str = PLACES) -> None:
    """Refuse the name of a place that is neither a bucket nor a path.

    `option` begins the message; `places` as for `find_mistake`.

    Raises:
        UsageError: It is empty, or looks like an address of another kind.
    """
    mistake = find_mistake(text, places) if text else f"'': give {places}."
    if mistake is not None:
        raise UsageError(f"{option} {mistake}".lstrip())


def require_path(text: str, option: str = "") -> None:
    """Refuse what is no path on this machine, a bucket too; see `require_place`."""
    require_place(text, option, LOCAL_PLACES)


def _is_address(name: str, mark: str) -> bool:
    if not mark.startswith(":"):
        return name.lower() in {*_KNOWN_SCHEMES, *BUCKETS} and mark.startswith("//")
    return len(mark) > 1 or bool(_SCHEME.fullmatch(name))


def _suggest(scheme: str, rest: str) -> str:
    """Return what a mistyped address was meant to be, "" where nobody knows."""
    if scheme == "file" and rest:
        return f"/{rest}"
    meant = _OTHER_NAMES.get(scheme, scheme)
    return f"{meant}://{rest}" if meant in BUCKETS and rest else ""
