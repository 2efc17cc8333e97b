"""The names of places: what is a bucket, what a path, and what is refused."""

from __future__ import annotations

from pathlib import PureWindowsPath

import pytest

from utils.base import uri as uri_module
from utils.base.errors import UsageError
from utils.base.uri import find_mistake, require_path, require_place


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("gs:/bucket", "gs://bucket"),
        ("gs:bucket/a", "gs://bucket/a"),
        ("gs//bucket", "gs://bucket"),
        ("gs///bucket", "gs://bucket"),
        ("gs:///bucket/a", "gs://bucket/a"),
        ("GS://bucket", "gs://bucket"),
        ("Gs:/bucket/A", "gs://bucket/A"),
        (" gs://bucket", "gs://bucket"),
        ("gs :/bucket", "gs://bucket"),
        ("gs:\\\\bucket\\a", "gs://bucket/a"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("file:///data/a", "/data/a"),
        ("file:/data/a", "/data/a"),
    ],
)
def test_a_mistyped_address_is_refused_with_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        require_place(text, "--output")
    assert str(caught.value) == f"--output {text}: did you mean {meant}?"


@pytest.mark.parametrize(
    "text", ["s3://bucket/a", "s3//b", "http://x/y", "HTTPS://x", "abfs://c@a/x", "hdfs://n:80/x"]
)
def test_an_address_of_another_kind_is_refused(text: str) -> None:
    assert find_mistake(text) == f"{text}: give gs://bucket/prefix or a directory."


@pytest.mark.parametrize(
    "text",
    [
        "s3:/x",
        "C:\\data",
        "C:/data",
        "c:data",
        "remote:x",
        "gs:",
        "me@host:/data",
        "hf:me/data",
        ":/x",
    ],
)
def test_what_might_be_a_directory_is_refused_with_the_way_to_name_one(text: str) -> None:
    assert find_mistake(text) == (
        f"{text}: give gs://bucket/prefix or a directory. For a directory of that name, write "
        f"./{text}"
    )


@pytest.mark.parametrize(
    "text",
    [
        "gs://bucket",
        "gs://bucket/a:b",
        "gs://",
        "",
        ".",
        "data",
        "data//shards",
        "gs",
        "gs/bucket",
        "./a:b",
        "./gs:/bucket",
        "a/b:/c",
        "/data/gs://x",
        "/a:b",
        "../s3:/x",
        "~/a:b",
        "//server/a",
        "runs-2026-01-01T10:30",
        "2026:01",
        "10:30/a",
        "wiki.en:1",
    ],
)
def test_buckets_and_paths_are_let_pass(text: str) -> None:
    assert find_mistake(text) is None


@pytest.mark.parametrize("text", ["gs://bucket/a", "gs:/bucket", "s3://x", "GS://bucket"])
def test_a_path_is_no_bucket(text: str) -> None:
    with pytest.raises(UsageError, match=f"^--to {text}: give a path on this machine"):
        require_path(text, "--to")
    require_path("./gs:/bucket", "--to")


def test_a_drive_is_one_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uri_module, "PurePath", PureWindowsPath)
    for text in ("C:\\data", "c:/data", "C:data"):
        assert find_mistake(text) is None
    assert find_mistake("gs:/bucket") is not None
