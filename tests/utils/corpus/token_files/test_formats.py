"""Token files of other tools: their ids unchanged, their documents, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from scripts import prepare_data
from tests import sample_token_files as files
from tests.sample_token_files import Documents, Writer
from utils.base.errors import ExitCode
from utils.corpus.token_files import source as token_files

EOS = 50256
VOCABULARY = ["--vocab-size", "50257", "--eos-id", str(EOS)]


def make_documents() -> list[list[int]]:
    """All but the third end with the end token, which the sixth has inside, too, twice."""
    rng = np.random.default_rng(0)
    found = [[*rng.integers(0, EOS, size).tolist(), EOS] for size in rng.integers(2, 99, 12)]
    found[2].pop()
    found[5][:2] = EOS, EOS
    return found


DOCUMENTS = make_documents()
NUM_IDS = sum(map(len, DOCUMENTS))
NUM_ENDS = sum(document.count(EOS) for document in DOCUMENTS)
UINT16 = ["--token-dtype", "uint16"]
TOKENS = ["--text-column", "tokens"]
# Writer -> further options, and whether the format says what a document is.
FORMATS: dict[str, tuple[Writer, list[str], bool]] = {
    "Megatron, uint16": (files.write_megatron, [], True),
    "Megatron, int32": (partial(files.write_megatron, dtype="<i4", code=4), [], True),
    "Megatron, int64": (partial(files.write_megatron, dtype="<i8", code=5), [], True),
    "llm.c, uint16": (files.write_llmc, [], False),
    "llm.c, uint32": (partial(files.write_llmc, magic=20240801), [], False),
    "nanoGPT": (files.write_nanogpt, UINT16, False),
    "datatrove, uint16": (files.write_datatrove, [], True),
    "datatrove, uint32": (partial(files.write_datatrove, dtype="<u4"), [], True),
    "MDS, any type": (files.write_mds, [], True),
    "MDS, int32": (partial(files.write_mds, encoding="ndarray:int32"), [], True),
    "MDS, bytes": (
        partial(files.write_mds, encoding="bytes"),
        ["--token-dtype", "int64", *TOKENS],
        True,
    ),
    "Parquet": (files.write_parquet, [], True),
    "Parquet, nested": (files.write_nested_parquet, ["--text-column", "input_ids"], True),
    "Arrow, file": (files.write_arrow, [], True),
    "Arrow, stream": (files.write_arrow_stream, [], True),
    "saved dataset": (files.write_saved, [], True),
}


def prepare(path: Path, output: Path, *options: str) -> int:
    arguments = ["--input", str(path), "--output", str(output), "--quiet", *options]
    return prepare_data.main(arguments)


def ids_of(output: Path) -> list[int]:
    shards = sorted(output.glob("train_*.npz"))
    return np.concatenate([np.load(shard)["input_ids"] for shard in shards]).tolist()


@pytest.mark.parametrize("block", [7, 2**20])
@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_documents_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    writer, options, has_documents = FORMATS[name]
    path, output = writer(tmp_path, DOCUMENTS), tmp_path / "out"
    monkeypatch.setattr(token_files, "BLOCK_TOKENS", block)
    options = [*VOCABULARY, *options, "--validation-fraction", "0"]

    for _ in range(2):  # the same again is recognized
        assert prepare(path, output, *options) == ExitCode.DONE

    index = json.loads((output / "index.json").read_text())
    assert ids_of(output) == sum(DOCUMENTS, [])
    assert (index["vocab_size"], index["eos_token_id"]) == (50257, EOS)
    if block > NUM_IDS:  # a document longer than a block comes in parts
        expected = len(DOCUMENTS) if has_documents else NUM_ENDS
        assert index["summary"]["documents"] == expected


def test_folders_and_globs_take_data_with_its_index_and_name_what_they_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for writer in (files.write_megatron, files.write_datatrove, files.write_parquet):
        writer(folder, DOCUMENTS)
    for name in ("a.bin", "a.idx"):  # links as in the cache of the Hugging Face hub
        blob = (folder / name).rename(tmp_path / name.replace(".", "-"))
        (folder / name).symlink_to(blob)
    files.write_nanogpt(folder, [[1]])
    files.write_saved(folder, DOCUMENTS)
    found = {}
    for pattern in ("", "*.ds*", "a.*"):
        output = tmp_path / f"out{len(found)}"
        options = [*VOCABULARY, "--validation-fraction", "0"]
        assert prepare(folder / pattern, output, *options) == ExitCode.DONE
        found[pattern] = ids_of(output)
    left_out = " ".join(capsys.readouterr().err.split())

    assert found == {
        name: sum(DOCUMENTS, []) * n for name, n in (("", 3), ("*.ds*", 1), ("a.*", 2))
    }
    assert "5 files not read" in left_out
    assert "saved/data-00000-of-00002.arrow" in left_out
    assert "train.bin" in left_out


def test_what_parallel_writers_leave_is_read(tmp_path: Path) -> None:
    written = files.write_datatrove(tmp_path, DOCUMENTS).rename(tmp_path / "00001.ds")
    Path(f"{tmp_path}/00000_unshuffled.ds.index").rename(f"{written}.index")
    for name in ("00000.ds", "00000.ds.index"):  # a task that had no documents
        (tmp_path / name).touch()
    merged = files.write_mds(tmp_path, DOCUMENTS)
    index = (merged / "index.json").read_text()
    for number in "01":  # as `merge_index` names them
        (merged / number).mkdir()
        (merged / f"shard.0000{number}.mds").rename(merged / number / "shard.00000.mds")
        index = index.replace(f"shard.0000{number}.mds", f"{number}/shard.00000.mds")
    (merged / "index.json").write_text(index)

    for path in (tmp_path / "*.ds", merged):
        options = [*VOCABULARY, "--validation-fraction", "0", "--overwrite"]
        assert prepare(path, tmp_path / "out", *options) == ExitCode.DONE
        assert ids_of(tmp_path / "out") == sum(DOCUMENTS, [])


@pytest.mark.parametrize("name", FORMATS)
def test_an_id_above_the_vocabulary_is_named_with_its_document_and_position(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writer, options, _ = FORMATS[name]
    monkeypatch.setattr(token_files, "BLOCK_TOKENS", 6)  # the third document begins in the first
    path = writer(tmp_path, [[5, 6, 0], [7, 0], [5, 400, 300, 0], [1, 0]])

    code = prepare(path, tmp_path / "out", "--vocab-size", "301", "--eos-id", "0", *options)

    assert code == ExitCode.USAGE
    expected = f"{path}: token id 400 at position 1 of document 3 is outside the vocabulary of 301."
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# What is broken.


def patch(start: int, content: bytes) -> Callable[[Path], object]:
    """Return a function that overwrites bytes of a file."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[start : start + len(content)] = content
        path.write_bytes(data)

    return change


def cut(count: int) -> Callable[[Path], object]:
    """Return a function that takes bytes from the end of a file."""
    return lambda path: path.write_bytes(path.read_bytes()[:-count])


def without(path: Path) -> None:
    path.unlink()


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def table(**columns: Any) -> Writer:
    def write(folder: Path, _: Documents) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return write


def write_saved_splits(folder: Path, _: Documents) -> Path:
    rows = datasets.Dataset.from_dict({"ids": [[1]]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_saved_text(folder: Path, _: Documents) -> Path:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


DS, SHARD, PART = "00000_unshuffled.ds", "mds/shard.00001.mds", "saved/data-00001-of-00002.arrow"
HEAD = 34
BROKEN = [
    ("Megatron, uint16", "a.idx", cut(5), r"a\.idx: 24 sequences and 13 entries .*Is it whole"),
    ("Megatron, uint16", "a.idx", lambda path: path.write_bytes(b"MMIDIDX\0\0"), "inside its head"),
    ("Megatron, uint16", "a.idx", patch(0, b"TNTIDX\0\0"), r"a\.idx: begins with b'TNTIDX"),
    ("Megatron, uint16", "a.idx", patch(9, b"\2"), r"a\.idx: has version 2, only 1"),
    ("Megatron, uint16", "a.idx", patch(17, b"\7"), r"a\.idx: says type 7, .*8 \(uint16\)"),
    ("Megatron, uint16", "a.idx", patch(17, b"\4"), r"a\.idx: sequence 2 has"),
    ("Megatron, uint16", "a.idx", patch(HEAD, b"\xff\xff\xff\xff"), r"a\.idx: sequence 1 has -1"),
    ("Megatron, uint16", "a.idx", patch(HEAD + 12 * 24 + 8, b"\xff"), "document 2 ends before"),
    ("Megatron, uint16", "a.idx", patch(HEAD + 12 * 24 + 8, b"\xff" * 8), "document 1 ends before"),
    ("Megatron, uint16", "a.idx", patch(HEAD + 12 * 24 + 96, b"\x64"), "sequences 0 to 100, not"),
    ("Megatron, uint16", "a.bin", cut(2), r"a\.idx: points past the end of a\.bin"),
    ("Megatron, uint16", "a.bin", lambda path: path.write_bytes(b""), r"a\.bin: holds no tokens"),
    ("llm.c, uint16", "a.bin", patch(4, b"\2"), "has version 2; 1 goes with uint16"),
    ("llm.c, uint32", "a.bin", patch(4, b"\1"), "has version 1; 7 goes with uint32"),
    ("llm.c, uint16", "a.bin", cut(2), r"a\.bin: .*its header says \d+ tokens, it holds \d+"),
    ("llm.c, uint16", "a.bin", lambda path: path.write_bytes(path.read_bytes()[:9]), "after 9 of"),
    ("nanoGPT", "train.bin", cut(1), r"train\.bin: \d+ bytes are no whole number of uint16"),
    ("datatrove, uint16", f"{DS}.index", without, r"ds: .*index is not beside it"),
    ("datatrove, uint16", f"{DS}.index", cut(3), r"ds\.index: 93 bytes, 8 for each document"),
    ("datatrove, uint16", f"{DS}.index", cut(8), "one of the files is cut"),
    ("datatrove, uint16", f"{DS}.index", patch(8, b"\0"), r"ds\.index: document 2 ends before"),
    ("datatrove, uint16", f"{DS}.index", patch(0, b"\xff" * 8), "document 1 ends before"),
    ("datatrove, uint16", DS, cut(1), "one of the files is cut"),
    ("datatrove, uint16", f"{DS}.metadata", edit("|2", "|4"), "as its metadata say"),
    ("Parquet", "a.parquet", cut(7), r"a\.parquet: not a readable Parquet file"),
    ("Parquet", "a.parquet", patch(0, b"PAR1" + bytes(400)), r"a\.parquet: not a readable Parqu"),
    ("Arrow, file", "a.arrow", cut(40), r"a\.arrow: not a readable Arrow file"),
    ("Arrow, stream", "a.arrow", cut(400), r"a\.arrow: not a readable Arrow file"),
    ("Arrow, stream", "a.arrow", patch(0, bytes(99)), r"a\.arrow: not a readable Arrow file"),
    ("saved dataset", PART, without, "saved: not a readable dataset"),
    ("saved dataset", PART, cut(99), "saved: not a readable dataset"),
    ("MDS, any type", SHARD, cut(3), r"00001\.mds: [\d,]+ bytes and 6 samples; .*Is it whole"),
    ("MDS, any type", SHARD, patch(8, b"\xff\xff"), r"00001\.mds, sample 1: stands from byte"),
    ("MDS, any type", SHARD, patch(4 + 28 + 8 + 3, b"\x22"), r"00001\.mds, sample 1: not readable"),
    ("MDS, any type", SHARD, patch(4 + 28 + 4, b"\xff\xff"), r"sample 1: .*bytes, \d+ are left"),
    ("MDS, any type", SHARD, without, r"00001\.mds: it is not there; index\.json names it"),
    ("MDS, any type", "mds/index.json", edit('"version": 2, "s', '"version": 1, "s'), "version 1"),
    ("MDS, any type", "mds/index.json", edit('"ndarray"', '"pkl"'), r"tokens \(pkl\)"),
    (
        "MDS, any type",
        "mds/index.json",
        edit("column_names", "n"),
        "mds: not a readable token file",
    ),
    ("MDS, any type", "mds/index.json", edit('"raw_data"', '"raw"'), "not a readable index of MDS"),
]


@pytest.mark.parametrize(("name", "file", "damage", "message"), BROKEN)
def test_a_broken_file_is_refused_with_its_place_and_the_reason(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    file: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    writer, options, _ = FORMATS[name]
    path = writer(tmp_path, DOCUMENTS)
    damage(tmp_path / file)

    assert prepare(path, tmp_path / "out", *VOCABULARY, *options) == ExitCode.USAGE

    assert_refused(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def assert_refused(error: str, message: str) -> None:
    text = " ".join(error.split())
    assert re.search(message, text), text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("writer", "options", "message"),
    [
        (table(input_ids=[[1], None]), [], r"parquet, row 2: column 'input_ids' is null"),
        (table(input_ids=[[1], [2], [3, None]]), [], r"parquet, row 3: .* has a null"),
        (table(ids=[[1]], a=[0.5]), ["--text-column", "a"], "column 'a' is float"),
        (table(text=["a"], ids=[[1]]), ["--eos-id", "0"], "--eos-id 0 has no effect"),
        (write_saved_text, [], r"Columns: text \(string\).*--hf FOLDER"),
        (write_saved_splits, [], "holds train, test. Give one"),
        (partial(files.write_mds, encoding="bytes"), [], "--token-dtype, for example int64"),
        (partial(files.write_mds, encoding="bytes"), [*UINT16, *TOKENS], "wider than uint16"),
        (partial(files.write_nanogpt, dtype="<u4"), UINT16, "wider than uint16"),
        (files.write_nanogpt, [], "--token-dtype, .* nanoGPT writes uint16"),
        (files.write_megatron, ["--token-dtype", "uint32"], "the .idx beside it says uint16"),
        (files.write_llmc, ["--token-dtype", "uint32"], "its header says uint16"),
        (files.write_datatrove, UINT16, "--token-dtype 'uint16' has no effect"),
    ],
)
def test_what_does_not_say_how_it_is_read_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    writer: Writer,
    options: list[str],
    message: str,
) -> None:
    path = writer(tmp_path, DOCUMENTS)
    assert prepare(path, tmp_path / "out", "--vocab-size", "50257", *options) == ExitCode.USAGE
    assert_refused(capsys.readouterr().err, message)


# The writers and readers of the other tools themselves.


def with_megatron(folder: Path) -> tuple[Path, list[int]]:
    name = "megatron.core.datasets.indexed_dataset"
    megatron = pytest.importorskip(name, reason="megatron-core is not installed")
    builder = megatron.IndexedDatasetBuilder(str(folder / "a.bin"), dtype=np.int32)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(folder / "a.idx"))
    read = megatron.IndexedDataset(str(folder / "a"))
    return folder / "a.bin", np.concatenate([read[n] for n in range(len(read))]).tolist()


def with_datatrove(folder: Path) -> tuple[Path, list[int]]:
    tokens = pytest.importorskip("datatrove.pipeline.tokens.tokenizer", reason="no datatrove")
    from datatrove.utils.dataset import DatatroveFileDataset

    file = tokens.TokenizedFile(str(folder), "a.ds", save_final_metadata=True)
    for document in DOCUMENTS:
        file.write(document, None)
    file.close()
    read = DatatroveFileDataset(str(folder / "a.ds"), seq_len=NUM_IDS - 1)
    return folder / "a.ds", read[0]["input_ids"].tolist()


def with_streaming(folder: Path) -> tuple[Path, list[int]]:
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed")
    columns = {"tokens": "ndarray:int32", "id": "str", "extra": "json", "what": "pkl"}
    with streaming.MDSWriter(out=str(folder / "a"), columns=columns, size_limit=900) as writer:
        for number, ids in enumerate(DOCUMENTS):
            tokens = np.array(ids, np.int32)
            writer.write({"tokens": tokens, "id": str(number), "extra": [number], "what": {}})
    read = streaming.LocalDataset(str(folder / "a"))
    return folder / "a", np.concatenate([sample["tokens"] for sample in read]).tolist()


@pytest.mark.filterwarnings("ignore")  # of the other tools
@pytest.mark.parametrize("with_peer", [with_megatron, with_datatrove, with_streaming])
def test_ids_are_those_that_the_other_tool_writes_and_reads(
    tmp_path: Path, with_peer: Callable[[Path], tuple[Path, list[int]]]
) -> None:
    (tmp_path / "in").mkdir()
    path, expected = with_peer(tmp_path / "in")
    assert expected == sum(DOCUMENTS, [])

    options = ["--validation-fraction", "0", "--json"]
    assert prepare(path, tmp_path / "out", *VOCABULARY, *options) == ExitCode.DONE

    assert ids_of(tmp_path / "out") == expected
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["summary"]["documents"] == len(DOCUMENTS)
