"""Which transport takes an archive to a place: the one that is asked for, or the first that works.

`auto` tries them in the order of `TRANSPORTS`, each with a small object that is written, read and
deleted. A kind of bucket that `TRANSPORTS` does not name is written by `python`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from configs.training_config import TrainingConfig
from utils.base.errors import StorageError
from utils.base.uri import local_path, require_place, scheme_of
from utils.storage.bucket import Meter
from utils.uploads.command_transports import GcloudTransport, GsutilTransport
from utils.uploads.transports import (
    BucketTransport,
    DirectoryTransport,
    GcsTransport,
    Transport,
    TransportOptions,
    put_bytes,
)
from utils.uploads.watched_command import START_SECONDS

BYTES_PER_MEGABIT = 125_000

log = logging.getLogger(__name__)

OpenTransport = Callable[[TransportOptions, Meter], Transport]
TRANSPORTS: dict[str, dict[str, OpenTransport]] = {
    "gs": {"python": GcsTransport, "gcloud": GcloudTransport, "gsutil": GsutilTransport}
}
"""Scheme -> its transports by name, the fastest first (BENCHMARKS.md). `auto` takes the first that
works."""


def _openers(uri: str) -> dict[str, OpenTransport]:
    """Return the transports to a place, by name, in the order in which `auto` tries them."""
    if local_path(uri) is not None:
        return {"directory": DirectoryTransport}
    return TRANSPORTS.get(scheme_of(uri) or "", {"python": BucketTransport})


def _settle(uri: str, name: str) -> str:
    """Return `name`, or what auto means where there is one transport alone."""
    names = list(_openers(uri))
    return names[0] if name == "auto" and len(names) == 1 else name


def configured_transport(config: TrainingConfig, scratch: Path | None = None) -> TransportOptions:
    """Return what a configuration asks for; `name` may be auto.

    `scratch` is a directory for a local archive, where the transport needs one.
    """
    rate = config.upload_max_mbps
    return TransportOptions(
        config.bucket_uri,
        _settle(config.bucket_uri, config.upload_transport),
        config.gcs_user_project,
        config.upload_streams,
        None if rate is None else rate * BYTES_PER_MEGABIT,
        config.upload_stall_seconds,
        scratch=None if scratch is None else str(scratch),
    )


def tool_words(name: str) -> str:
    """Return ` with gsutil`, to put after a place; nothing of a directory, which needs no tool."""
    return "" if name == DirectoryTransport.name else f" with {name}"


def open_transport(options: TransportOptions, meter: Meter | None = None) -> Transport:
    """Return a transport; `options.name` must not be auto where there are several.

    Raises:
        UsageError: The URI is neither a bucket nor a directory.
        StorageError: It does not fit the URI, or its program is not installed.
    """
    uri, name = options.uri, options.name
    require_place(uri)
    openers, name = _openers(uri), _settle(uri, name)
    if name not in openers:
        needed = "directory" if name == "directory" else "URI such as gs://bucket/prefix"
        raise StorageError(f"upload_transport {name} needs a {needed}, not {uri}.")
    return openers[name](options, meter or Meter(options.max_bytes_per_second))


def probe_transport(
    options: TransportOptions, folder: str, retry_seconds: float
) -> tuple[TransportOptions, str | None]:
    """Write, read and delete a small object; `auto` takes the first transport that can.

    Returns:
        The transport that works, and what does not work but is not needed: where nothing can be
        deleted, it has one stream.

    Raises:
        StorageError: Nothing works; the message says why for each.
    """
    is_open = _settle(options.uri, options.name) == "auto"
    names = list(_openers(options.uri)) if is_open else [options.name]
    errors: list[StorageError] = []
    for name in names:
        wanted = replace(options, name=name)
        stall_seconds = min(options.stall_seconds, START_SECONDS + retry_seconds)
        hasty = replace(wanted, retry_seconds=retry_seconds, stall_seconds=stall_seconds)
        try:
            with contextlib.closing(open_transport(hasty)) as transport:
                warning = _probe(transport, folder)
        except StorageError as exc:
            log.debug("upload_transport %s does not work: %s", name, exc)
            errors.append(exc)
            continue
        return (wanted if warning is None else replace(wanted, streams=1)), warning
    raise errors[0] if len(errors) == 1 else type(errors[0])(" ".join(map(str, errors)))


def _probe(transport: Transport, folder: str) -> str | None:
    """Return what is wrong with listing and deleting, None where nothing is."""
    name, token = f"{folder}/.probe-{secrets.token_hex(4)}", secrets.token_bytes(16)
    put_bytes(transport, name, token, None)
    if transport.read(name) != token:
        raise StorageError(f"{transport.uri}: what was written could not be read back.")
    try:
        transport.delete(name)
        transport.remove_unfinished(folder, only=name)  # lists, as uploads in parts do
    except StorageError as exc:
        return f"{transport.uri}: objects cannot be listed and deleted ({exc})"
    return None
