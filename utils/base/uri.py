"""What a user calls a place: `gs://bucket/prefix`, or a path on this machine.

Everything else that looks like an address, such as `gs:/bucket` or `s3://bucket`, is refused: taken
for a directory, it would be made, written and found in order. Whoever reads the name of a place
asks here. Nothing is imported but errors, so that the configuration can.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from utils.base.errors import UsageError

PLACES = "gs://bucket/prefix or a directory"
LOCAL_PLACES = "a path on this machine"
GCS_PREFIX = "gs://"
_GCS_NAMES = ("gs", "gcs")
# A slash is forgotten easily, but only where the scheme is a known one is it no directory.
_KNOWN_SCHEMES = ("gs", "gcs", "s3", "http", "https", "file")
_BEGINNING = re.compile(r"\s*([^/\\:]*)(:?[/\\]*)(.*)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z]+[0-9]?")


def is_gcs_uri(uri: str) -> bool:
    """Tell whether `uri` names a Google Cloud Storage bucket."""
    return uri.startswith(GCS_PREFIX)


def join_uri(uri: str, *names: str) -> str:
    """Append object names to a bucket URI; empty names are left out."""
    base = uri if uri.endswith("://") else uri.rstrip("/")
    return "/".join([base, *(name.strip("/") for name in names if name)])


def normalize_uri(uri: str) -> str:
    """Return the one spelling of a bucket URI: directories absolute, no slash at the end."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())


def find_mistake(text: str, places: str = PLACES) -> str | None:
    """Return what is wrong with the name of a place, None where nothing is.

    A directory whose name begins like an address is reached by `./NAME`.

    Args:
        text: What the user has written.
        places: What it may be; a bucket only where this says so.
    """
    is_local = places == LOCAL_PLACES
    if is_gcs_uri(text) and not text.startswith(f"{GCS_PREFIX}/"):
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

    Args:
        text: What the user has written.
        option: Where; it begins the message.
        places: As `find_mistake`.

    Raises:
        UsageError: It looks like an address of another kind.
    """
    mistake = find_mistake(text, places)
    if mistake is not None:
        raise UsageError(f"{option} {mistake}".lstrip())


def require_path(text: str, option: str = "") -> None:
    """Refuse what is no path on this machine, a bucket too; see `require_place`."""
    require_place(text, option, LOCAL_PLACES)


def _is_address(name: str, mark: str) -> bool:
    if not mark.startswith(":"):
        return name.lower() in _KNOWN_SCHEMES and mark.startswith("//")
    return len(mark) > 1 or bool(_SCHEME.fullmatch(name))


def _suggest(scheme: str, rest: str) -> str:
    """Return what a mistyped address was meant to be, "" where nobody knows."""
    if scheme == "file" and rest:
        return f"/{rest}"
    return f"{GCS_PREFIX}{rest}" if scheme in _GCS_NAMES and rest else ""
