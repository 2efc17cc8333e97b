import gzip
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.sample_json import UNREADABLE
from utils.base.errors import DataError
from utils.corpus.documents import NullText, OpenText
from utils.corpus.text_sources.files import FileSource

TEXT = "One.\r\n\r\n  Two: d\u00e9j\u00e0 vu \U0001f600\n"


def read(path: Path, **options: str) -> list[str]:
    return list(FileSource((path,), **options).documents())


def test_text_file_is_one_document_byte_for_byte_or_one_for_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    assert read(path) == [TEXT]
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n two \nthree\xe2\x80\xa8still three")

    assert read(path, document_per="line") == ["one", "", " two ", "three\u2028still three"]
    path.write_bytes(b"good\nbad \xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 4 is not UTF-8"):
        read(path, document_per="line")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, suffix: str) -> None:
    content = b"".join(json.dumps({"text": f"{TEXT}{n}"}).encode() + b"\n" for n in range(5_000))
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(content, mtime=0))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)

    assert read(path) == [f"{TEXT}{n}" for n in range(5_000)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xffbad", "byte 4 is not UTF-8"),
        ("a.txt", "\ufefftext".encode("utf-16-le"), r"cat \S+ | iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "\ufefftext".encode("utf-32-be"), "this is UTF-32, "),
        ("a.txt", "Nothing says so.\n".encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "iconv -f UTF-16BE"),
        (
            "a.txt.gz",
            gzip.compress("text".encode("utf-16"), mtime=0),
            r"gzip -dc \S+ | iconv -f UTF-16",
        ),
        ("a.txt", tarfile.TarInfo("b").tobuf(), r"tar -xf \S+a\.txt"),
        ("a.tar.gz", gzip.compress(tarfile.TarInfo("b").tobuf(format=2), mtime=0), "tar -xf"),
        ("a", b"PK\x03\x04", "zip archive"),
        ("a.md", b"abc\0def", "byte 3 is NUL: this is binary data"),
        ("a.txt", b"damaged" * 200_000 + bytes(9), "byte 1400000 is NUL.*tr -d"),
        ("a.csv", b"text\na\n", "--hf FOLDER"),
        ("a.json", b"no JSON", "a.json:1: not JSON"),
        ("a.jsonl", UNREADABLE["nested deeply"], "a.jsonl:1: not JSON .it is nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"txt": "a", "id": 1}\n', "a.jsonl: no column 'text'. Columns: txt, id"),
        ("a.jsonl", b'{"text": 3}\n', "column 'text' is int"),
        ("a.jsonl", b"[1]\n", "a JSON object is needed, got list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt.zst", b"no zstd", "cannot be read"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
    ],
)
def test_unreadable_file_is_named_with_the_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=message) as caught:
        read(path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "b1946ac92492", "a.txt", "a.jsonl"])
@pytest.mark.parametrize("form", ["lines", "array", "lines of a Mac"])
def test_records_are_read_as_such_whatever_the_name(tmp_path: Path, name: str, form: str) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in (TEXT, "b")]
    text = {"lines": "\n".join(lines), "array": f"[{', '.join(lines)}]"}.get(form, "\r".join(lines))
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)

    assert read(tmp_path / name) == [TEXT, "b"]
    if name == "a.txt":
        assert read(tmp_path / name, document_separator="<end>") == [text]


def test_one_json_object_is_a_record_and_other_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": TEXT}, indent=1))
    assert read(tmp_path / "a.json") == [TEXT]
    for text in ('{"a": 1}\nis an object.\n', "[Intro]\n{la}\n", '{"a": 1}\n', '{\n "text": 1'):
        (tmp_path / "song.txt").write_text(text)
        assert read(tmp_path / "song.txt") == [text]


def test_lines_that_end_with_cr_alone_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\rd\u00e9j\u00e0\r\rfour\r".encode())
    assert read(path, document_per="line") == ["one", "d\u00e9j\u00e0", "", "four"]
    path.write_bytes(b"progress\rline\r\ntwo\n")
    assert read(path, document_per="line") == ["progress\rline", "two"]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_a_long_text_is_cut_where_a_line_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("utils.corpus.text_sources.plain_text.TEXT_PART_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(f"A line of words.{end}".encode() * 30)
    parts = read(tmp_path / "a.txt")
    assert len(parts) > 4
    assert all(part.startswith("A line") for part in parts)


def test_text_file_is_cut_where_the_separator_stands(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    end = "<|endoftext|>"
    path.write_bytes(
        f"\ufeffOne day.\n\nThe end.\n{end}\nTwo.{end}{end}\n{end}\r\n d\u00e9j\u00e0\n".encode()
    )

    assert read(path, document_separator=end) == ["One day.\n\nThe end.", "Two.", " d\u00e9j\u00e0"]
    (tmp_path / "short.txt").write_text("a|b")
    assert read(tmp_path / "short.txt", document_separator="|") == ["a", "b"]
    assert (
        FileSource((path,), document_separator=end).fingerprint()
        != FileSource((path,)).fingerprint()
    )
    path.write_bytes(b"one<end>\ntw\xffo<end>")
    with pytest.raises(DataError, match=r"byte 11 is not UTF-8"):
        read(path, document_separator="<end>")


def test_a_separator_is_found_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stories.txt"
    stories = ["a" * 5, "b\n" * 40 + "b", "\u00e9" * 30, "c"]
    path.write_bytes("<end>".join(stories).encode())
    (tmp_path / "two.txt").write_text(f"{'a' * 20}<end>{'b' * 20}")
    two = FileSource((tmp_path / "two.txt",), document_separator="<end>")
    other = FileSource(two.paths, document_separator="<ends>")
    for block in range(6, 40):
        monkeypatch.setattr("utils.corpus.text_sources.plain_text.TEXT_PART_BYTES", block)
        parts = read(path, document_separator="<end>")
        assert "".join(parts) == "".join(stories)
        closed = [not isinstance(part, OpenText) for part in parts]
        assert sum(closed) == len(stories)
        assert any(isinstance(part, OpenText) for part in parts)
        assert two.uses("document_separator")
        assert not other.uses("document_separator")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "a.jsonl:3: column 'text' is null"),
        ("a.jsonl", b'{"text": "a"}\n{"b": 1}\n', "a.jsonl:2: no column 'text'. Columns: b"),
        ("a.json", b'[{"text": "a"}, {}]', "a.json, record 2: no column 'text'. Columns: none"),
        ("a.parquet", b"", "a.parquet, row 2: column 'text' is null"),
    ],
)
def test_text_that_is_null_or_missing_is_marked_with_its_place(
    tmp_path: Path, name: str, content: bytes, place: str
) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / name)

    text, null = read(tmp_path / name)
    assert text == "a"
    assert isinstance(null, NullText)
    assert null.startswith(f"{tmp_path}/{place}")


def test_fingerprint_follows_content_and_way_of_reading_but_not_the_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a\nb")
    two.write_text("a\nb")
    whole = FileSource((one,)).fingerprint()

    assert FileSource((two,)).fingerprint() == whole
    assert FileSource((one,), document_per="line").fingerprint() != whole
    two.write_text("a\nc")
    assert FileSource((two,)).fingerprint() != whole
