from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from scripts import prepare_data
from tests.campaigns import soak_tasks
from tests.gcs_server import FakeGcsServer
from tests.sample_shards import read_documents, read_files, read_texts
from tests.sample_token_files import write_mds, write_megatron, write_saved
from utils.base.errors import DataError
from utils.corpus.documents import NullText, OpenText
from utils.corpus.reading import assign_by_hash
from utils.corpus.text_sources.files import FileSource
from utils.corpus.text_sources.hub import HubSource
from utils.corpus.text_sources.sample import SampleSource
from utils.corpus.token_files.source import TokenFileSource

SEPARATOR = "<|endoftext|>"
# Text files: how they are cut into documents, and what stands between these.
HOW_TO_CUT = {
    "separated.txt": ({"document_separator": SEPARATOR}, SEPARATOR),
    "overlapping.txt": ({"document_separator": "aa"}, "aa"),
    "blocks.txt": ({"document_separator": "\n\n"}, "\n\n"),
    "lines.txt": ({"document_per": "line"}, "\n"),
    "mac.txt": ({"document_per": "line"}, "\r"),
}
TEXT = st.text(st.sampled_from('ab \n\r"[{}]\u00e9'), max_size=30)


@pytest.fixture(autouse=True)
def _chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_source(folder: Path, kind: str, texts: list[list[str]]) -> FileSource:
    """Write a file for each list of texts; return the source that they are."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.{kind}" for number in range(len(texts))]
    how, between = HOW_TO_CUT.get(kind, ({}, "\n"))
    for path, own in zip(paths, texts, strict=True):
        records = [{"text": text} for text in own]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        if kind == "parquet":
            table = pyarrow.table({"text": own or pyarrow.array([], pyarrow.string())})
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
        elif kind in ("jsonl", "json"):
            path.write_text(lines if kind == "jsonl" else json.dumps(records))
        else:
            text = between.join(own)
            path.write_bytes((text.replace("\n", "\r") if between == "\r" else text).encode())
    return FileSource(tuple(paths), **how)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "md", *HOW_TO_CUT])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.lists(TEXT, max_size=9), min_size=1, max_size=4), count=st.integers(1, 9))
def test_parts_hold_each_document_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, kind: str, texts: list[list[str]], count: int
) -> None:
    if kind == "json":  # an array of nothing is refused
        texts = [own or ["."] for own in texts]
    source = write_source(tmp_path_factory.mktemp("texts"), kind, texts)
    parts = [source.part(number, count) for number in range(count)]
    found = list(itertools.chain.from_iterable(part.documents() for part in parts))
    # A file that is empty is in no part, and gives no text.
    assert [text for text in found if text] == [text for text in source.documents() if text]


def test_a_large_file_is_divided_evenly_where_its_reader_allows_it(tmp_path: Path) -> None:
    texts = [f"Text {number}." for number in range(400)]
    for kind, most in (
        ("jsonl", 110),
        ("parquet", 220),  # half of such a small file is its footer
        ("separated.txt", 110),
        ("lines.txt", 110),
        ("jsonl.gz", 400),
        ("blocks.txt", 110),
    ):
        source = write_source(tmp_path / kind, kind, [texts])
        sizes = [len(list(source.part(number, 4).documents())) for number in range(4)]
        assert (sum(sizes), max(sizes) <= most) == (400, True), (kind, sizes)


def test_no_record_of_a_part_needs_the_column_where_the_file_has_it(tmp_path: Path) -> None:
    path, lines = tmp_path / "a.jsonl", ['{"body": "x"}\n'] * 99
    path.write_text("".join(['{"text": "y"}\n', *lines]))
    assert {type(text) for text in FileSource((path,)).part(2, 3).documents()} == {NullText}
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl: no column 'text'. Columns: body"):
        list(FileSource((path,)).part(2, 3).documents())


def test_a_part_changes_its_fingerprint_with_its_own_bytes_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path, "jsonl", [[f"Text {number}." for number in range(99)]])
    before = [source.part(number, 3).fingerprint() for number in range(3)]
    data = source.paths[0].read_bytes()
    source.paths[0].write_bytes(data.replace(b"Text 98", b"Text 89"))
    after = [source.part(number, 3).fingerprint() for number in range(3)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False]


def test_other_sources_are_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "data", "jsonl", [["a", "b", "c", "d", "e"]])
    np.save(tmp_path / "a.npy", np.arange(9))
    np.save(tmp_path / "b.npy", np.arange(5))
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for write in (write_megatron, write_saved, write_mds):
        folder = tmp_path / write.__name__
        folder.mkdir()
        files.append(write(folder, [[1, 2, 3], [4, 5]]))
    tokens = TokenFileSource(tuple(files))
    hub = HubSource(str(tmp_path / "data"))
    monkeypatch.setattr(
        "utils.corpus.text_sources.sample._collect_sample", lambda _: ["a", "b", "c", "d"]
    )
    for source in (SampleSource(), hub, dataclasses.replace(hub, streaming=True), tokens):
        parts = [list(source.part(number, 7).documents()) for number in range(7)]
        found = Counter(map(str, itertools.chain.from_iterable(parts)))
        assert found == Counter(map(str, source.documents()))
    before = hub.outline()
    with (tmp_path / "data" / "0.jsonl").open("a") as file:
        file.write('{"text": "f"}\n')
    assert hub.outline() != before  # another task would cut it elsewhere


def test_the_split_follows_from_the_text_and_not_from_how_it_comes() -> None:
    long = "word " * 300_000
    whole = [*(f"text {number}" for number in range(2000)), long]
    splits = {item.content: item.split for item in assign_by_hash(whole, 0.1)}
    assert 120 < Counter(splits.values())["val"] < 280
    parts = [OpenText(long[:1_000_000]), long[1_000_000:]]
    again = list(assign_by_hash([*parts, *reversed(whole[:-1])], 0.1))
    assert {item.split for item in again[:2]} == {splits[long]}
    assert {item.content: item.split for item in again[2:]}.items() <= splits.items()


def run(*words: object) -> int:
    return prepare_data.main([*map(str, words), "--quiet"])


def documents_of(output: Path) -> dict[str, Counter[tuple[int, ...]]]:
    """Return the documents of a merged output, as ids, by split."""
    return {split: Counter(map(tuple, own)) for split, own in read_documents(output).items()}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command without its output and tasks; `texts` are its sources."""
    generator = np.random.default_rng(3)
    for kind in ("jsonl", "separated.txt", "jsonl.gz", "parquet"):
        texts = [f"{kind} {number} " + "ab " * generator.integers(1, 40) for number in range(150)]
        write_source(tmp_path / "texts", kind, [texts])
    return ["--input", "texts", "--document-separator", SEPARATOR, "--shard-tokens", "900"]


def prepare_all(words: list[str], count: int, output: Path) -> None:
    for task in ("tokenizer", *range(count)):
        assert run(*words, "--output", output, "--tasks", count, "--task", task) == 0
    assert run("merge", output) == 0


def test_eight_tasks_and_one_give_the_same_documents(words: list[str], tmp_path: Path) -> None:
    words += ["--vocab-size", "300"]
    for count in (1, 8):
        prepare_all(words, count, tmp_path / str(count))
    one, eight = (documents_of(tmp_path / name) for name in "18")
    assert one == eight
    assert 10 < one["val"].total() < 60
    indices = [json.loads((tmp_path / name / "index.json").read_text()) for name in "18"]
    assert indices[0]["summary"] == indices[1]["summary"]
    assert indices[0]["tokenizer_crc32c"] == indices[1]["tokenizer_crc32c"]

    texts = itertools.chain.from_iterable(read_texts(tmp_path / "8").values())
    source = FileSource(tuple(sorted((tmp_path / "texts").iterdir())), document_separator=SEPARATOR)
    assert Counter(texts) == Counter(source.documents())


def test_parts_in_any_order_and_twice_are_the_same_bytes(words: list[str], tmp_path: Path) -> None:
    words += ["--vocab-size", "300"]
    prepare_all(words, 3, tmp_path / "a")
    for task in ("tokenizer", 2, 0, 2, 1, "tokenizer"):
        assert run(*words, "--output", "b", "--tasks", 3, "--task", task) == 0
    assert run("merge", "b") == run("merge", "b") == 0
    assert run(*words, "--output", "b", "--tasks", 3, "--task", 1) == 0
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_merge_names_what_is_missing_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--vocab-size", "300", "--output", "out", "--tasks", "4"]
    for task in ("tokenizer", 0, 2):
        assert run(*words, "--task", task) == 0
    assert run("merge", "out") == 2
    assert "2 of 4 tasks are not done: 1, 3." in capsys.readouterr().err
    for task in (1, 3):
        assert run(*words, "--task", task) == 0
    shard = tmp_path / "out" / "task-00000" / "train_00000.npz"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert run("merge", "out") == 2
    assert "1 of 4 tasks are not done: 0." in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()
    assert run(*words, "--task", 0) == run("merge", "out") == 0
    assert shard.read_bytes() == whole


def test_another_corpus_is_left_alone_and_replaced_when_asked(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--vocab-size", "300"]
    prepare_all(words, 3, tmp_path / "out")
    before = documents_of(tmp_path / "out")
    # The same command, another number of tasks; then a source that has grown.
    assert run(*words, "--output", "out", "--tasks", 2, "--task", 0, "--overwrite") == 2
    assert "or --task tokenizer --overwrite, once, to replace it" in capsys.readouterr().err
    assert run(*words, "--output", "out") == 2
    with (tmp_path / "texts" / "0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert run(*words, "--output", "out", "--tasks", 3, "--task", 0) == 2
    assert "holds other data" in capsys.readouterr().err
    assert documents_of(tmp_path / "out") == before

    replaced = [*words, "--output", "out", "--tasks", 2, "--task"]
    assert run(*replaced, "tokenizer", "--overwrite") == 0
    assert not list((tmp_path / "out").glob("task-*/*"))
    assert run(*replaced, 0) == run(*replaced, 1) == run("merge", "out") == 0
    assert sum(map(Counter.total, documents_of(tmp_path / "out").values())) == 601


def test_a_given_tokenizer_needs_no_step_of_its_own(words: list[str], tmp_path: Path) -> None:
    prepare_all([*words, "--vocab-size", "300"], 1, tmp_path / "first")
    words += ["--tokenizer", "first", "--output", "out", "--tasks", "500", "--task"]
    # More tasks than there are places to cut at: some parts are empty.
    assert all(run(*words, task) == 0 for task in range(0, 500, 100))
    index = json.loads((tmp_path / "out" / "task-00100" / "index.json").read_text())
    assert index["tokenizer_sha256"]
    assert not (tmp_path / "out" / "index.json").exists()


def test_token_files_are_prepared_in_tasks(tmp_path: Path) -> None:
    for number in range(5):
        np.save(tmp_path / f"{number}.npy", np.arange(1, 40 + number))
    words = ["--input", *(f"{number}.npy" for number in range(5)), "--vocab-size", "99"]
    for task in range(2):
        assert run(*words, "--output", "out", "--tasks", 2, "--task", task) == 0
    assert run("merge", "out") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["summary"]["tokens"] == 39 + 40 + 41 + 42 + 43


def test_the_tokenizer_is_trained_on_a_sample_from_all_over(
    words: list[str], tmp_path: Path
) -> None:
    words += ["--vocab-size", "600", "--tasks", "2", "--task", "tokenizer"]
    vocabularies = {}
    for size in (300, 10**6):
        assert run(*words, "--output", size, "--tokenizer-sample", size) == 0
        vocabularies[size] = Backend.from_file(f"{size}/tokenizer.json").get_vocab_size()
    assert vocabularies[300] < vocabularies[10**6]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "3"], "--tasks needs --task I"),
        (["--task", "0"], "--task goes with --tasks N"),
        (["--executor", "local"], "--executor goes with --tasks N"),
        (["--tasks", "3", "--task", "3"], "--task must be from 0 to 2, got 3"),
        (["--tasks", "0", "--task", "0"], "--tasks must be from 1"),
        (["--tasks", "3", "--task", "0"], "the same command with --task tokenizer"),
        (["--tasks", "3", "--task", "0", "--dedup"], "--dedup needs all documents"),
        (["--tasks", "3", "--task", "0", "--validation-tail", "0.1"], "--validation-tail needs"),
        (["--tasks", "3", "--task", "0", "--executor-option", "a=1"], "goes with --executor"),
    ],
)
def test_what_does_not_fit_tasks_is_refused(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, "--vocab-size", 300, "--output", "out", *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()


@pytest.mark.slow
def test_tasks_that_are_killed_lose_and_double_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert soak_tasks.main(["--cycles", "4", "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert results["kills"] >= 4
    assert results["findings"] == []


def test_tasks_write_into_a_bucket(words: list[str], gcs: FakeGcsServer, tmp_path: Path) -> None:
    words += ["--vocab-size", "300"]
    prepare_all(words, 2, tmp_path / "local")
    command = [*words, "--output", "gs://runs/web", "--tasks", 2, "--task"]
    for task in ("tokenizer", 0, 1):
        assert run(*command, task) == 0
    assert run("merge", "gs://runs/web") == run("get", "gs://runs/web", "copy") == 0
    assert documents_of(tmp_path / "copy") == documents_of(tmp_path / "local")
