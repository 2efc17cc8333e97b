import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from tests.sample_shards import read_files, read_texts
from utils.base.errors import DataError, StorageError, UsageError
from utils.corpus import tokenization
from utils.corpus.documents import NullText, OpenText, Source
from utils.corpus.prepare import CorpusOptions, Preparation, prepare_corpus
from utils.corpus.reading import assign_splits, assign_tail
from utils.corpus.text_sources.files import FileSource
from utils.corpus.token_cache import TokenCache
from utils.corpus.token_files.source import TokenFileSource
from utils.storage.bucket import ObjectInfo
from utils.storage.directory import DirectoryBucket

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = np.random.default_rng(7)
    words = ["shard", "token", "bucket", "the", "of", "d\u00e9j\u00e0", "it's", "42", "{x}"]
    return [
        f"Document {n}:\n" + " ".join(generator.choice(words, generator.integers(1, 60)))
        for n in range(200)
    ]


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> FileSource:
    return make_source(tmp_path / "texts.jsonl", texts)


def make_source(path: Path, texts: list[str]) -> FileSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FileSource((path,))


def prepare(
    source: Source, output: Path | DirectoryBucket, overwrite: bool = False, **changes: object
) -> Preparation:
    options = CorpusOptions(**{"vocab_size": VOCAB_SIZE, "shard_tokens": 800, **changes})
    bucket = DirectoryBucket(output) if isinstance(output, Path) else output
    return prepare_corpus([source], bucket, options, overwrite)


def tokens_of(directory: Path, split: str) -> np.ndarray:
    shards = []
    for path in sorted(directory.glob(f"{split}_*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            shards.append(archive["input_ids"])
    return np.concatenate(shards) if shards else np.array([], np.uint16)


def test_every_document_is_in_exactly_one_shard(
    source: FileSource, tmp_path: Path, texts: list[str]
) -> None:
    prepare(source, tmp_path / "out")
    training, validation = read_texts(tmp_path / "out").values()

    assert sum(map(len, validation)) == pytest.approx(0.05 * len("".join(texts)), rel=0.05)
    assert sorted(training + validation) == sorted(texts)
    assert len(list((tmp_path / "out").glob("train_*.npz"))) > 5


def test_index_describes_the_files_and_the_training_tokens(
    source: FileSource, tmp_path: Path, texts: list[str]
) -> None:
    index = prepare(source, tmp_path / "out").index
    training, validation = (tokens_of(tmp_path / "out", split) for split in ("train", "val"))
    _, counts = np.unique(training, return_counts=True)
    shares = counts / len(training)
    summary = index["summary"]

    assert json.loads((tmp_path / "out" / "index.json").read_text()) == index
    assert [shard["name"] for shard in index["shards"]] == sorted(
        path.name for path in (tmp_path / "out").glob("*.npz")
    )
    assert {shard["dtype"] for shard in index["shards"]} == {"uint16"}
    assert summary["documents"] == len(texts)
    assert summary["bytes"] == sum(len(text.encode()) for text in texts)
    assert summary["tokens"] == len(training) + len(validation)
    assert summary["training_tokens"] == len(training)
    assert summary["unigram_entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_output_that_is_already_whole_is_left_alone(source: FileSource, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    second = prepare(source, tmp_path / "out", overwrite=True)

    assert (first.is_new, second.is_new) == (True, False)
    assert second.index == first.index
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize("name", ["train_00003.npz", "val_00000.npz", "tokenizer.json"])
def test_damaged_output_is_prepared_again(source: FileSource, tmp_path: Path, name: str) -> None:
    prepare(source, tmp_path / "out")
    whole = read_files(tmp_path / "out")
    path = tmp_path / "out" / name
    path.unlink()
    assert prepare(source, tmp_path / "out").is_new
    assert read_files(tmp_path / "out") == whole
    path.write_bytes(bytes([whole[name][0] ^ 1]) + whole[name][1:])
    assert prepare(source, tmp_path / "out").is_new
    assert read_files(tmp_path / "out") == whole


class FailingBucket(DirectoryBucket):
    """A bucket that is lost before the given shard, and remembers which it got."""

    def __init__(self, root: Path, fails_at: str | None = None) -> None:
        super().__init__(root)
        self.fails_at = fails_at
        self.got: list[str] = []

    def put_file(self, name: str, path: Path) -> ObjectInfo:
        if name == self.fails_at:
            raise StorageError(f"{name}: connection lost.")
        self.got.append(name)
        return super().put_file(name, path)


@pytest.mark.parametrize(
    ("fails_at", "lost", "changes"),
    [
        ("train_00000.npz", None, {}),
        ("val_00000.npz", None, {}),
        ("train_00003.npz", None, {"shard_tokens": None}),
        ("train_00004.npz", "train_00001.npz", {}),
    ],
)
def test_interrupted_preparation_goes_on_and_ends_with_the_same_bytes(
    source: FileSource, tmp_path: Path, fails_at: str, lost: str | None, changes: dict[str, object]
) -> None:
    prepare(source, tmp_path / "straight", **changes)
    with pytest.raises(StorageError, match="connection lost"):
        prepare(source, FailingBucket(tmp_path / "out", fails_at), **changes)
    done = {path.name for path in (tmp_path / "out").glob("*.npz")}
    assert not (tmp_path / "out" / "index.json").exists()
    if lost:
        (tmp_path / "out" / lost).unlink()

    bucket = FailingBucket(tmp_path / "out")
    prepare(source, bucket, **changes)

    assert bool(done & set(bucket.got)) == bool(lost or changes)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "straight")
    if changes:
        assert len(list((tmp_path / "out").glob("train_*.npz"))) == 5


def test_other_options_in_the_same_output_are_refused_unless_overwritten(
    source: FileSource, tmp_path: Path
) -> None:
    changes = {"shard_tokens": 2_000, "vocab_size": 300, "validation_fraction": 0.1}
    prepare(source, tmp_path / "out")
    before = read_files(tmp_path / "out")
    prepare(source, tmp_path / "fresh", **changes)

    with pytest.raises(UsageError, match="--overwrite"):
        prepare(source, tmp_path / "out", **changes)
    assert read_files(tmp_path / "out") == before

    prepare(source, tmp_path / "out", overwrite=True, **changes)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")


@pytest.mark.parametrize("is_same", [True, False])
def test_an_output_that_another_command_took_meanwhile_is_looked_at_again(
    source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    train = tokenization.build_tokenizer
    theirs = {} if is_same else {"shard_tokens": 2_000}

    def train_slowly(*arguments: object) -> object:
        monkeypatch.setattr(tokenization, "build_tokenizer", train)
        prepare(source, tmp_path / "out", **theirs)
        return train(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenization, "build_tokenizer", train_slowly)
    bucket = FailingBucket(tmp_path / "out")
    if is_same:
        assert not prepare(source, bucket).is_new
    else:
        with pytest.raises(UsageError, match="Nothing was changed"):
            prepare(source, bucket)
    assert bucket.got == []
    prepare(source, tmp_path / "straight", **theirs)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "straight")


def test_shards_of_others_are_never_touched_and_other_files_are_no_obstacle(
    source: FileSource, tmp_path: Path
) -> None:
    (tmp_path / "out" / "Checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "Checkpoints" / "a.npz").write_bytes(b"not a shard")
    (tmp_path / "out" / "README.md").write_text("about this data")
    theirs = tmp_path / "out" / "fineweb_0001.npz"
    theirs.write_bytes(b"precious")

    with pytest.raises(UsageError, match=r"fineweb_0001\.npz"):
        prepare(source, tmp_path / "out", overwrite=True)
    assert theirs.read_bytes() == b"precious"
    assert len(list((tmp_path / "out").iterdir())) == 3

    theirs.unlink()
    assert prepare(source, tmp_path / "out").is_new


@pytest.mark.parametrize("share", ["validation_fraction", "validation_tail"])
def test_one_long_document_is_read_in_parts_and_its_end_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    monkeypatch.setattr("utils.corpus.text_sources.plain_text.TEXT_PART_BYTES", 1000)
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 200)
    text = "".join(f"Line {n}: d\u00e9j\u00e0 vu.\n" for n in range(1000))
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = FileSource((tmp_path / "book.txt",))
    index = prepare(source, tmp_path / "whole", validation_fraction=0).index
    monkeypatch.undo()
    prepare(source, tmp_path / "out", **{"validation_fraction": 0, share: 0.1})

    assert read_texts(tmp_path / "whole")["train"] == [text]
    assert not list((tmp_path / "whole").glob("val_*.npz"))
    assert index["summary"]["documents"] == 1
    assert len(index["shards"]) > 5
    training, validation = map("".join, read_texts(tmp_path / "out").values())
    assert training + validation == text
    assert training.endswith("\n")
    assert len(validation) == pytest.approx(len(text) * 0.1, rel=0.1)


def test_overwriting_with_a_broken_source_leaves_the_old_data_whole(
    source: FileSource, tmp_path: Path
) -> None:
    prepare(source, tmp_path / "out")
    before = read_files(tmp_path / "out")
    (tmp_path / "broken.jsonl").write_text("{\n")
    np.save(tmp_path / "a.npy", np.array([1, 2, 70_000]))
    for broken, message in (
        (FileSource((tmp_path / "broken.jsonl",)), "not JSON"),
        (TokenFileSource((tmp_path / "a.npy",)), "token id 70000 at position 2"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(broken, tmp_path / "out", overwrite=True)
        assert read_files(tmp_path / "out") == before


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1), max_size=80),
    fraction=st.floats(0, 0.999).filter(lambda value: value == 0 or value > 0.01),
)
def test_splitting_neither_loses_nor_repeats_text(texts: list[str], fraction: float) -> None:
    documents = list(assign_splits(texts, fraction))
    wanted = fraction * len("".join(texts).encode())

    assert "".join(document.content for document in documents) == "".join(texts)
    assert all(document.content for document in documents)
    if [document.content for document in documents] == texts:
        held = sum(len(one.content.encode()) for one in documents if one.split == "val")
        assert held <= 1.05 * wanted


LONG_TEXT = "One more line of it.\n" * 50_000


@pytest.mark.parametrize(
    "texts",
    [
        [("long " if n % 20 == 19 else "short ") * (n % 20 * 10 + 1) for n in range(1_000)],
        [*["A short text."] * 40, LONG_TEXT],
        [LONG_TEXT, *["A short text."] * 40],
        [LONG_TEXT] * 3,
    ],
)
def test_the_share_is_of_the_text_whatever_the_order_and_the_sizes(texts: list[str]) -> None:
    documents = assign_splits(texts, 0.05)
    held = sum(len(document.content) for document in documents if document.split == "val")
    assert held / len("".join(texts)) == pytest.approx(0.05, rel=0.05)


def test_documents_held_out_are_as_long_as_the_others() -> None:
    sizes = np.random.default_rng(0).lognormal(3, 1, 20_000).astype(int) + 1
    documents = assign_splits(("x" * size for size in sizes), 0.05)
    held = [len(document.content) for document in documents if document.split == "val"]
    assert np.mean(held) == pytest.approx(np.mean(sizes), rel=0.15)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint64])
def test_token_ids_count_as_text_of_their_number(dtype: type) -> None:
    mixed = assign_splits(["x" * 400, np.zeros(100, dtype)] * 100, 0.05)
    text = assign_splits(["x" * 400] * 200, 0.05)
    assert [one.split for one in mixed] == [one.split for one in text]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_single_document_is_split_where_a_line_begins(end: str) -> None:
    training, validation = assign_splits([f"A line.{end}" * 99], 0.05)
    assert (training.split, validation.split) == ("train", "val")
    assert training.content.endswith(f".{end}")
    assert validation.content.startswith("A line.")


class PartsSource:
    """Documents in parts, as they are given."""

    holds_tokens = False

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def documents(self) -> Iterator[str]:
        yield from self._parts

    def fingerprint(self) -> str:
        return repr(self._parts)


def test_a_document_in_parts_keeps_its_end_and_repeats_as_a_whole(tmp_path: Path) -> None:
    one, two = OpenText("one "), OpenText("two ")
    parts = ["end", one, two, "", one, "end", "one ", OpenText(""), "", one, "end"]
    once = ["end", "one two ", "one end", "one "]
    others = [OpenText("on"), OpenText("e "), "end"]  # an end, but no repeat: it is cut elsewhere
    for deduplicate, documents, num_left_out in (
        (False, [*once, "one end", "one end"], 1),
        (True, [*once, "one end"], 2),
    ):
        out = tmp_path / str(deduplicate)
        changes = {"deduplicate": deduplicate, "validation_fraction": 0}
        index = prepare(PartsSource(*parts, *others), out, **changes).index  # type: ignore[arg-type]
        assert read_texts(out)["train"] == documents
        assert index["summary"]["documents"] == len(documents)
        assert index["summary"]["documents_left_out"] == num_left_out


@pytest.mark.parametrize("fails_at", ["train_00002.npz", "val_00001.npz"])
def test_an_interrupted_preparation_goes_on_in_a_document_whose_end_is_held_out(
    tmp_path: Path, fails_at: str
) -> None:
    texts = [f"A short text, number {n}." for n in range(60)]
    long = [OpenText(LONG_TEXT[:20_000]), LONG_TEXT[:60_000]]
    source = PartsSource(*texts, NullText("Here."), *long)
    changes = {"deduplicate": True, "skip_null": True, "validation_fraction": 0.3}
    changes |= {"vocab_size": 270, "shard_tokens": 200}
    with pytest.raises(StorageError):
        prepare(source, FailingBucket(tmp_path / "out", fails_at), **changes)  # type: ignore[arg-type]
    prepare(source, bucket := FailingBucket(tmp_path / "out"), **changes)  # type: ignore[arg-type]
    prepare(source, tmp_path / "straight", **changes)  # type: ignore[arg-type]

    assert read_files(tmp_path / "out") == read_files(tmp_path / "straight")
    assert "train_00000.npz" not in bucket.got
    assert not {"skip_null"} & set(CorpusOptions(vocab_size=270).fingerprint())


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": "gpt2"},
        {"shard_tokens": 0},
        {"special_tokens": ("",)},
        {"special_tokens": ("<|endoftext|>",)},
        {"special_tokens": ("x",)},
        {"special_tokens": ("<|x|>",), "vocab_size": 257},
        {"special_tokens": ("<|x|>",), "vocab_size": None, "tokenizer": "gpt2"},
        {"validation_tail": 0.1},
        {"validation_tail": 1.0, "validation_fraction": 0},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"validation_fraction": math.nan},
    ],
)
def test_options_that_cannot_be_are_refused_with_nothing_written(
    source: FileSource, tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match="--"):
        prepare(source, tmp_path / "out", **changes)

    assert not (tmp_path / "out").exists()


def test_a_source_that_is_empty_or_broken_is_an_error_with_nothing_written(
    source: FileSource, tmp_path: Path
) -> None:
    empty = make_source(tmp_path / "empty.jsonl", ["", ""])
    broken = make_source(tmp_path / "broken.jsonl", ["fine"] * 30)
    with (tmp_path / "broken.jsonl").open("a") as file:
        file.write("{broken\n")
    options = CorpusOptions(vocab_size=VOCAB_SIZE)
    for sources, held_out, message in (
        ([empty], [], "no text at all"),
        ([broken], [], r"broken\.jsonl:31: not JSON"),
        ([source], [empty], "--validation-input holds no text"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_corpus(
                sources, DirectoryBucket(tmp_path / "o"), options, validation_sources=held_out
            )
    assert not (tmp_path / "o").exists()


# Validation, parts of long documents, token files, the token cache.


def test_a_tail_holds_out_the_last_documents(
    source: FileSource, tmp_path: Path, texts: list[str]
) -> None:
    prepare(source, tmp_path / "out", validation_fraction=0, validation_tail=0.2)
    training, validation = read_texts(tmp_path / "out").values()

    assert training + validation == texts
    share = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.18 < share <= 0.2


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=30), tail=st.floats(0.01, 0.99))
def test_a_tail_neither_loses_nor_repeats_text(texts: list[str], tail: float) -> None:
    documents = list(assign_tail(texts, tail, len(texts), len("".join(texts).encode())))
    splits = [document.split for document in documents]

    assert "".join(str(document.content) for document in documents) == "".join(texts)
    assert splits == sorted(splits)  # train, then val


def test_a_separate_source_is_held_out_whole_and_nothing_else(
    source: FileSource, tmp_path: Path, texts: list[str]
) -> None:
    held_out = make_source(tmp_path / "held.jsonl", ["Other one.", texts[0], "Other two."])
    options = CorpusOptions(
        vocab_size=VOCAB_SIZE, shard_tokens=800, validation_fraction=0, deduplicate=True
    )
    arguments = ([source], DirectoryBucket(tmp_path / "out"), options)
    prepare_corpus(*arguments, validation_sources=[held_out])

    assert read_texts(tmp_path / "out")["train"] == texts
    assert read_texts(tmp_path / "out")["val"] == ["Other one.", "Other two."]
    assert not prepare_corpus(*arguments, validation_sources=[held_out]).is_new
    make_source(tmp_path / "held.jsonl", ["Changed."])
    with pytest.raises(UsageError, match="--overwrite"):
        prepare_corpus(*arguments, validation_sources=[held_out])


def test_token_files_need_no_tokenizer_and_go_on_after_an_interruption(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 60_000, 50_000).astype(np.int64)
    ids[::97] = 0
    np.save(tmp_path / "a.npy", ids)
    source = TokenFileSource((tmp_path / "a.npy",), eos_token_id=0)
    options = CorpusOptions(vocab_size=60_000, eos_token_id=0, shard_tokens=9_000)
    with pytest.raises(StorageError):
        prepare_corpus([source], FailingBucket(tmp_path / "out", "train_00003.npz"), options)
    bucket = DirectoryBucket(tmp_path / "out")
    index = prepare_corpus([source], bucket, options).index

    parts = list(assign_splits(np.split(ids, np.flatnonzero(ids == 0) + 1), 0.05))
    held_out = [part.content for part in parts if part.split == "val"]
    kept = [part.content for part in parts if part.split == "train"]
    np.testing.assert_array_equal(tokens_of(tmp_path / "out", "train"), np.concatenate(kept))
    np.testing.assert_array_equal(tokens_of(tmp_path / "out", "val"), np.concatenate(held_out))
    assert (index["vocab_size"], index["eos_token_id"]) == (60_000, 0)
    assert (index["tokenizer_files"], index["tokenizer_sha256"]) == ([], None)
    assert {shard["dtype"] for shard in index["shards"]} == {"uint16"}
    assert not prepare_corpus([source], bucket, options).is_new


def test_token_files_beside_text_keep_their_order_and_need_a_tokenizer(
    source: FileSource, tmp_path: Path, texts: list[str]
) -> None:
    np.save(tmp_path / "a.npy", np.array([5, 6, 7]))
    both = [source, TokenFileSource((tmp_path / "a.npy",)), source]
    with pytest.raises(UsageError, match="need --tokenizer"):
        prepare_corpus(both, DirectoryBucket(tmp_path / "o"), CorpusOptions(vocab_size=VOCAB_SIZE))
    prepare(source, tmp_path / "first", validation_fraction=0)
    options = CorpusOptions(tokenizer=str(tmp_path / "first"), validation_fraction=0)
    prepare_corpus(both, DirectoryBucket(tmp_path / "out"), options)

    text = tokens_of(tmp_path / "first", "train")
    expected = np.concatenate([text, [5, 6, 7], text])
    np.testing.assert_array_equal(tokens_of(tmp_path / "out", "train"), expected)


def test_unchanged_text_is_not_tokenized_again(
    source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: str, cache: TokenCache | None, **changes: object) -> TokenCache | None:
        options = CorpusOptions(**{"vocab_size": VOCAB_SIZE, "shard_tokens": 800, **changes})
        bucket = DirectoryBucket(tmp_path / output)
        prepare_corpus([source], bucket, options, token_cache=cache)
        return cache

    def cache() -> TokenCache:
        return TokenCache(tmp_path / "cache")

    compressed = {"shard_tokens": 3_000, "compress": True}
    other_split = {"validation_fraction": 0.2, "vocab_size": None, "tokenizer": tmp_path / "first"}
    for path in run("first", cache()).directory.rglob("*"):  # cut entries are no entries
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-3])
    run("again", cache())
    run("expected", None, **compressed)
    run("split", None, **other_split)
    monkeypatch.setattr(tokenization, "build_tokenizer", None)  # not trained again either
    for name, expected, changes in (
        ("1", "first", {}),
        ("2", "expected", compressed),
        ("3", "split", other_split),
    ):
        used = run(name, cache(), **changes)
        assert used.num_misses == 0 < used.num_hits
        assert read_files(tmp_path / name) == read_files(tmp_path / expected)


def test_one_cache_never_gives_the_tokenizer_of_other_text_or_options(
    tmp_path: Path, texts: list[str]
) -> None:
    sources = [make_source(tmp_path / f"{n}.jsonl", texts[n::2]) for n in range(2)]
    cache = TokenCache(tmp_path / "cache")
    cases = itertools.product(
        sources,
        ({}, {"vocab_size": 300}, {"special_tokens": ("<a>",)}, {"validation_fraction": 0.5}),
    )
    for number, (source, changes) in enumerate(cases):
        options = CorpusOptions(**{"vocab_size": 320, **changes})
        for name, used in (("shared", cache), ("none", None)):
            output = DirectoryBucket(tmp_path / f"{name}-{number}")
            prepare_corpus([source], output, options, token_cache=used)
        assert read_files(tmp_path / f"shared-{number}") == read_files(tmp_path / f"none-{number}")


@pytest.mark.parametrize(
    "held_out", [{"validation_fraction": 0.2}, {"validation_tail": 0.2}, "another source"]
)
def test_no_word_of_held_out_documents_becomes_a_token(
    tmp_path: Path, held_out: dict[str, float] | str
) -> None:
    letters = np.random.default_rng(3).choice(list("abcdefghijklmnopqrstuvwxyz"), (60, 9))
    words = ["".join(row) for row in letters]
    texts = [f"{' '.join([word] * 30)}\n" for word in words]
    shares, others = held_out, []
    if isinstance(held_out, str):
        shares, others = {}, [make_source(tmp_path / "val.jsonl", texts[48:])]
    prepare_corpus(
        [make_source(tmp_path / "a.jsonl", texts[: 48 if others else 60])],
        DirectoryBucket(tmp_path / "out"),
        CorpusOptions(vocab_size=2_000, **{"validation_fraction": 0.0, **shares}),
        validation_sources=others,
    )
    backend = Backend.from_file(str(tmp_path / "out" / "tokenizer.json"))
    known = {word for word in words if f"\u0120{word}" in backend.get_vocab()}
    seen, unseen = (
        {text.split()[0] for text in own} for own in read_texts(tmp_path / "out").values()
    )
    assert known == seen  # each word is in one document alone
    assert unseen
    assert not seen & unseen


def test_text_before_and_after_a_change_is_not_tokenized_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 2_000)
    prepare(make_source(tmp_path / "a.jsonl", texts), tmp_path / "tokenizer")
    many = [f"{text} {n}" for n in range(6) for text in texts]

    def misses(output: str, texts: list[str]) -> int:
        cache = TokenCache(tmp_path / "cache")
        options = CorpusOptions(tokenizer=str(tmp_path / "tokenizer"))
        source = make_source(tmp_path / "many.jsonl", texts)
        prepare_corpus([source], DirectoryBucket(tmp_path / output), options, token_cache=cache)
        return cache.num_misses

    first = misses("1", many)
    assert first > 50
    assert misses("2", ["New text in front.", *many]) < first / 4
    assert misses("3", [*many, "New text at the end."]) < 5


def test_the_index_lists_the_tokenizer_files_and_auto_tokenizer_loads_them(
    source: FileSource, tmp_path: Path
) -> None:
    index = prepare(source, tmp_path / "out", special_tokens=("<|pad|>", "<|x|>")).index
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)

    assert index["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert len(tokenizer) == index["vocab_size"] == VOCAB_SIZE
    assert tokenizer.eos_token_id == index["eos_token_id"] == 0
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|x|>"]) == [0, 1, 2]
    assert tokenizer("a<|x|>").input_ids[-1] == 2
    assert not {1, 2} & set(tokens_of(tmp_path / "out", "train").tolist())


def test_an_end_of_text_spelled_out_in_the_text_is_told(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(texts))
    taken = {"vocab_size": None, "tokenizer": str(tmp_path / "one")}
    for name, options in (("one", {}), ("two", taken)):
        caplog.clear()
        prepare(FileSource((path,)), tmp_path / name, **options)
        assert f"The text has <|endoftext|> in it, {len(texts) - 1} times" in caplog.text
        assert "--document-separator '<|endoftext|>'" in caplog.text
    caplog.clear()
    prepare(FileSource((path,), document_separator="<|endoftext|>"), tmp_path / "many")
    assert "--document-separator" not in caplog.text
