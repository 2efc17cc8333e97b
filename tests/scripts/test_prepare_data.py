import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from scripts import prepare_data
from tests.processes import run_in_terminal, run_python
from tests.sample_json import UNREADABLE
from tests.sample_shards import flip_bit, read_files
from utils.base.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture(autouse=True)
def _chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the token cache out of here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def sample_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sample") / "data"
    assert prepare_data.main(["--sample", "--output", str(output), "--quiet"]) == 0
    return output


@pytest.fixture
def data(sample_output: Path, tmp_path: Path) -> Path:
    """A copy of the sample that a test may change."""
    return Path(shutil.copytree(sample_output, tmp_path / "data"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {n} of this book.\n" for n in range(300)))
    return path


BOOK = ["--input", "book.txt", "--vocab-size", "300"]
NPY = ["--input", "t.npy", "--vocab-size", "80000"]
RECORDS = ["--input", "a.jsonl", "--vocab-size", "300"]
SAVED = ["--hf", "saved", "--vocab-size", "300"]


def test_sample_makes_five_training_shards_and_one_for_validation(
    sample_output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_output / "index.json").read_text())
    tokens = {shard["name"]: shard["tokens"] for shard in index["shards"]}

    assert sorted(tokens) == [f"train_0000{n}.npz" for n in range(5)] + ["val_00000.npz"]
    assert index["vocab_size"] == 4096
    assert 2_000 < index["summary"]["documents"] < 3_000
    assert 1_500_000 < index["summary"]["bytes"] < 2_000_000
    assert 400_000 < sum(tokens.values()) < 550_000
    assert 6.4 < index["summary"]["unigram_entropy_nats"] < 6.9
    for name, count in tokens.items():
        with np.load(sample_output / name, allow_pickle=False) as archive:
            assert archive["input_ids"].shape == (count,)
            assert archive["input_ids"].max() < 4096
    assert prepare_data.main(["--sample", "--output", str(sample_output)]) == ExitCode.DONE
    assert "Already prepared" in capsys.readouterr().out


def test_summary_shows_what_came_out_and_where(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(text_file), "--vocab-size", "300", "--output", str(tmp_path / "o")]
    arguments += ["--token-cache", "off"]
    assert prepare_data.main(arguments) == ExitCode.DONE
    text = capsys.readouterr().out
    assert prepare_data.main([*arguments, "--json"]) == ExitCode.DONE
    summary = json.loads(capsys.readouterr().out)

    for value in (
        str(tmp_path / "o"),
        f"{summary['tokens']:,}",
        f"{summary['tokens_per_byte']:.3f}",
        f"{summary['unigram_entropy_nats']:.3f} nats",
        f", {summary['validation_share']:.2%})",
        "1 training, 1 validation",
    ):
        assert value in text
    assert summary["bytes"] == text_file.stat().st_size
    assert summary["vocab_size"] == 300
    assert summary["validation_share"] == summary["validation_tokens"] / summary["tokens"]
    assert summary["is_new"] is False


def test_it_runs_as_a_module_too() -> None:
    result = run_python("-m", "scripts.prepare_data", "--help")
    assert result.returncode == 0
    assert "--sample" in result.stdout


def test_preparing_with_a_new_tokenizer_loads_no_torch(text_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, scripts.prepare_data as p\n"
        f"p.main(['--input', {str(text_file)!r}, '--vocab-size', '300', '--output', "
        f"{str(tmp_path / 'o')!r}, '--token-cache', 'off'])\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )

    assert run_python("-c", code).stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "300"], "Nothing to prepare"),
        (["--input", "book.txt"], "--vocab-size N"),
        (["--input", "nowhere.txt", "--vocab-size", "300"], "no such file"),
        (["--input", "book.txt", "--vocab-size", "10"], "at least 257"),
        (["--input", "book.txt", "--tokenizer", "book.txt"], "cannot be loaded"),
        (["--input", "book.txt", "--tokenizer", "./nowhere"], "no such file or directory"),
        (["--input", "book.txt", "--tokenizer", "bad.model"], "bad.model"),
        (["--input", "t.bin", "--vocab-size", "300"], "--token-dtype"),
        (["--input", "t.npy", "--vocab-size", "3"], "token id 70000"),
        (["--input", "t.npy"], "The input holds token ids: give --tokenizer T"),
        (["--input", "wide.txt", "--vocab-size", "300"], "iconv -f UTF-16 -t UTF-8"),
        ([*NPY, "--eos-id", "-1"], "--eos-id"),
        ([*NPY, "--eos-id", "90000"], "--eos-id 90000"),
        ([*NPY, "--input", "book.txt"], "need --tokenizer"),
        ([*NPY, "--special-token", "<x>"], "--special"),
        ([*BOOK, "--skip-null"], "--skip-null has no effect here: it goes with text in JSON"),
        ([*BOOK, "--eos-id", "0"], "--eos-id 0 has no effect here: it goes with token files"),
        ([*BOOK, "--token-dtype", "uint16"], "--token-dtype 'uint16' has no effect"),
        ([*BOOK, "--streaming"], "--streaming has no effect"),
        ([*BOOK, "--hf-config", "a"], "--hf-config 'a' has no effect"),
        ([*BOOK, "--split", "test"], "--split 'test' has no effect"),
        ([*BOOK, "--text-column", "text"], "--text-column 'text' has no effect"),
        ([*BOOK, "--document-separator", r"\n\n"], r"--document-separator '\n\n' has no effect"),
        ([*RECORDS, "--document-separator", "a"], "goes with text files that hold it"),
        ([*RECORDS, "--document-per", "line"], "--document-per 'line' has no effect"),
        ([*NPY, "--token-dtype", "uint16"], "it goes with .bin files"),
        ([*NPY, "--token-cache", "c"], "--token-cache 'c' has no effect"),
        (["--sample", "--text-column", "text"], "it goes with JSON, .parquet, .arrow"),
        ([*SAVED, "--hf-config", "a"], "--hf-config 'a' has no effect"),
        ([*SAVED, "--split", "train"], "--split 'train' has no effect"),
        ([*SAVED, "--text-column", "a"], "no column 'a'. Columns: text"),
        ([*BOOK, "--token-cache", "book.txt"], "is a file"),
        ([*BOOK, "--validation-input", "book.txt"], "book.txt is in --input, too"),
        ([*BOOK, "--validation-input", "none"], "--validation-input none"),
        ([*BOOK, "--output", "ftp://x/y"], "gs://bucket/prefix"),
        ([*BOOK, "--output", "book.txt"], "is a file; a directory is needed"),
        ([*BOOK, "--output", "book.txt/below"], "is a file; a directory is needed"),
        ([*BOOK, "--output", "other"], "--overwrite"),
    ],
)
def test_bad_request_is_one_message_and_exit_code_two(
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    np.save("t.npy", np.array([1, 70000]))
    Path("t.bin").write_bytes(bytes(8))
    Path("wide.txt").write_text("text", "utf-16")
    Path("bad.model").write_bytes(b"<html>")
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    datasets.Dataset.from_dict({"text": ["a"]}, split="test").save_to_disk("saved")
    Path("other").mkdir()
    Path("other/index.json").write_text("{}")
    before = text_file.read_bytes()

    code = prepare_data.main(["--output", "o", *arguments])

    error = capsys.readouterr().err
    assert code == ExitCode.USAGE
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "o").exists()
    assert text_file.read_bytes() == before
    assert [path.name for path in Path("other").iterdir()] == ["index.json"]


@pytest.mark.parametrize("name", ["index.json", "index.partial.json"])
def test_an_output_whose_index_cannot_be_read_is_kept_unless_it_is_to_be_replaced(
    text_file: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    arguments = [*BOOK, "--output", str(output)]
    assert prepare_data.main([*arguments, "--quiet"]) == ExitCode.DONE
    whole = read_files(output)
    if name != "index.json":
        (output / "index.json").unlink()
    (output / name).write_bytes(UNREADABLE["torn"])
    before = read_files(output)

    assert prepare_data.main(arguments) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert f"{output}/{name} is not usable" in error
    assert "--overwrite" in error
    assert read_files(output) == before
    assert prepare_data.main([*arguments, "--overwrite"]) == ExitCode.DONE
    assert read_files(output) == whole


def test_a_good_index_does_not_need_what_an_interruption_left(
    text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    arguments = [*BOOK, "--output", str(output)]
    assert prepare_data.main([*arguments, "--quiet"]) == ExitCode.DONE
    whole = read_files(output)
    (output / "index.partial.json").write_bytes(UNREADABLE["torn"])
    flip_bit(output / "tokenizer.json")
    assert prepare_data.main([*arguments, "--quiet"]) == ExitCode.DONE
    assert read_files(output) == whole


def test_a_damaged_tokenizer_of_data_is_not_used_for_more(
    text_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(data / "tokenizer.json")
    arguments = ["--input", str(text_file), "--output", str(tmp_path / "o"), "--tokenizer"]
    for path in (data, data / "tokenizer.json"):
        assert prepare_data.main([*arguments, str(path)]) == ExitCode.USAGE
        assert f"{data}/tokenizer.json is damaged or was replaced" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--sample"],
        ["--output", "o", "--vocab-size", "9", "--tokenizer", "x"],
        [*BOOK, "--output", "o", "--document-per", "line", "--document-separator", "book"],
        *(
            [*BOOK, "--output", "o", "--document-separator", text]
            for text in ("", "\\", r"\d", r"\xg", r"\ud800", "\udcff")
        ),
    ],
)
def test_malformed_command_line_is_exit_code_two(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare_data.main(options)

    assert caught.value.code == ExitCode.USAGE


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
def test_killed_preparation_goes_on_after_its_finished_shards(tmp_path: Path) -> None:
    lines = "".join(f"Line {n}: {n * n} is the square of {n}.\n" for n in range(12_000))
    (tmp_path / "lines.txt").write_text(lines)
    options = [str(SCRIPT), "--input", "lines.txt", "--document-per", "line", "--shard-tokens"]
    options += ["5000", "--vocab-size", "300", "--output"]
    process = subprocess.Popen(  # noqa: S603 - our own script
        [sys.executable, *options, "o"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr as log:
        while "train_00003.npz" not in log.readline():
            assert process.poll() is None
        process.kill()
    process.wait()
    assert not (tmp_path / "o" / "index.json").exists()

    again = run_python(*options, "o", cwd=tmp_path)
    straight = run_python(*options, "straight", cwd=tmp_path)

    assert (again.returncode, straight.returncode) == (0, 0)
    assert "Going on after" in again.stderr
    assert read_files(tmp_path / "o") == read_files(tmp_path / "straight")


# Sources and tokenizers of other kinds.


def test_a_directory_of_lines_and_token_files_goes_through_with_an_existing_tokenizer(
    text_file: Path, tmp_path: Path, sample_output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    text_file.rename(tmp_path / "texts" / "book.txt")
    (np.arange(1_000) % 4000).astype(np.uint16).tofile("val.bin")
    arguments = ["--input", "texts", "--document-per", "line", "--validation-input", "val.bin"]
    arguments += ["--token-dtype", "uint16", "--tokenizer", str(sample_output), "--output", "o"]

    assert prepare_data.main([*arguments, "--token-cache", "off", "--json"]) == ExitCode.DONE
    summary = json.loads(capsys.readouterr().out)
    assert (summary["documents"], summary["vocab_size"]) == (301, 4096)
    assert summary["validation_tokens"] == 1_000
    assert prepare_data.main(["inspect", "o"]) == ExitCode.DONE


def test_the_token_cache_lies_below_the_current_directory_and_can_be_off(
    text_file: Path, tmp_path: Path
) -> None:
    base = ["--input", str(text_file), "--vocab-size", "300", "--quiet", "--output"]

    assert prepare_data.main([*base, "a", "--token-cache", "off"]) == ExitCode.DONE
    sample = prepare_data.build_parser().parse_args(["--sample", "--output", "s"])
    assert prepare_data.open_token_cache(sample) is None
    assert not (tmp_path / "cache").exists()
    assert prepare_data.main([*base, "b"]) == ExitCode.DONE
    assert len([path for path in (tmp_path / "cache" / "tokens").rglob("*") if path.is_file()]) == 2
    assert prepare_data.main([*base, "c", "--token-cache", "mine"]) == ExitCode.DONE
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(("streaming", "kind"), [(True, "files"), (False, "saved")])
def test_a_local_hugging_face_dataset_is_prepared_and_its_changes_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, kind: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")

    def write(marker: str) -> None:
        rows = {"text": [f"{marker} text number {n}" for n in range(100)]}
        table = datasets.Dataset.from_dict(rows)
        if kind == "saved":
            table.save_to_disk(f"data-{marker}")
        else:
            Path(f"data-{marker}").mkdir()
            table.to_parquet(f"data-{marker}/train.parquet")

    write("old")
    write("new")
    arguments = ["--vocab-size", "280", "--output", "o", "--quiet", "--hf"]
    options = ["--streaming"] if streaming else []
    assert prepare_data.main([*arguments, "data-old", *options]) == ExitCode.DONE
    assert json.loads(Path("o/index.json").read_text())["summary"]["documents"] == 100
    assert prepare_data.main([*arguments, "data-new", *options]) == ExitCode.USAGE


def _write_rows(path: str, rows: list[dict[str, object]]) -> None:
    if path.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _shards(directory: str) -> dict[str, bytes]:
    return {name: data for name, data in read_files(Path(directory)).items() if "index" not in name}


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "a.jsonl:4"), ("a.parquet", ", row 4")])
def test_null_text_is_an_error_that_names_it_or_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    rows: list[dict[str, object]] = [{"text": f"Text {n} of some.", "n": n} for n in range(40)]
    _write_rows("whole.jsonl", rows)
    rows[3:3] = [{"text": None, "n": 0}, {"n": 1}]
    _write_rows(name, rows)
    arguments = ["--vocab-size", "300", "--token-cache", "off", "--output", "o", "--input", name]

    assert prepare_data.main(arguments) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert f"{place}: column 'text' is null" in error
    assert "--skip-null" in error
    assert not Path("o").exists()
    assert prepare_data.main([*arguments, "--skip-null"]) == ExitCode.DONE
    assert "40 (2 null)" in capsys.readouterr().out
    assert json.loads(Path("o/index.json").read_text())["summary"]["documents_null"] == 2
    arguments = arguments[:-1]
    assert prepare_data.main([*arguments, "whole.jsonl", "--output", "whole"]) == ExitCode.DONE
    assert _shards("o") == _shards("whole")
    arguments += [f"{name}::b", "--skip-null", "--output", "none"]
    assert prepare_data.main(arguments) == ExitCode.USAGE
    assert "no column 'b'. Columns: text, n." in capsys.readouterr().err


def test_each_input_may_name_the_column_of_its_text() -> None:
    texts = [f"Text {n} of all inputs." for n in range(60)]
    for name, column, part in (
        ("a.jsonl", "body", texts[:20]),
        ("b1.parquet", "content", texts[20:30]),
        ("b2.parquet", "content", texts[30:40]),
        ("c.jsonl", "text", texts[40:50]),
        ("val.jsonl", "held", texts[50:]),
        ("train.jsonl", "text", texts[:50]),
        ("test.jsonl", "text", texts[50:]),
    ):
        _write_rows(name, [{"id": "x", column: text} for text in part])
    options = ["--vocab-size", "300", "--token-cache", "off", "--quiet", "--output"]
    mixed = ["--input", "a.jsonl::body", "b?.parquet::content", "c.jsonl"]
    mixed += ["--validation-input", "val.jsonl::held"]
    plain = ["--input", "train.jsonl", "--validation-input", "test.jsonl"]

    assert prepare_data.main([*options, "mixed", *mixed]) == ExitCode.DONE
    assert prepare_data.main([*options, "plain", *plain]) == ExitCode.DONE
    assert _shards("mixed") == _shards("plain")


@pytest.mark.parametrize(
    ("option", "between"),
    [
        (r"\n\n", "\n\n\n"),
        (r"\r\n\x2d\r\n", "\r\n-\r\n"),
        (r"\t\f\v\u00a7", "\t\f\v\u00a7"),
        (r"\0", "\0"),
        (r"\\n", r"\n"),
        ("\u00a7\u4e2d", "\u00a7\u4e2d"),
    ],
)
def test_a_separator_may_be_written_with_escapes(
    option: str, between: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_bytes(between.join(["one\ntwo", "d\u00e9j\u00e0", "three"]).encode())
    Path("b.txt").write_text("one document")
    arguments = ["--input", "a.txt", "b.txt", "--vocab-size", "300", "--output", "o", "--json"]
    assert prepare_data.main([*arguments, "--document-separator", option]) == ExitCode.DONE
    summary = json.loads(capsys.readouterr().out)
    assert summary["documents"] == 4
    assert summary["bytes"] == len("one\ntwod\u00e9j\u00e0threeone document".encode())


def test_a_document_per_file_is_one_also_where_a_text_file_holds_records(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("a.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    arguments = ["--input", "a.txt", "--vocab-size", "300", "--output", "o", "--json"]
    assert prepare_data.main([*arguments, "--document-per", "file"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["documents"] == 1


# Commands on data that is there.


def test_data_goes_to_a_directory_and_back_and_away(
    sample_output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare_data.main(["put", str(sample_output), "store/data"]) == ExitCode.DONE
    assert prepare_data.main(["get", "store/data", "back", "--json"]) == ExitCode.DONE
    capsys.readouterr()
    assert prepare_data.main(["get", "store/data", "back", "--json"]) == ExitCode.DONE
    report = json.loads(capsys.readouterr().out)
    assert read_files(tmp_path / "back") == read_files(sample_output)
    assert report["files"] == report["skipped_files"] == len(read_files(sample_output))

    assert prepare_data.main(["ls", "store/data", "--json"]) == ExitCode.DONE
    listed = json.loads(capsys.readouterr().out)
    assert {item["name"] for item in listed["objects"]} == set(read_files(sample_output))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert prepare_data.main(["rm", "store/data"]) == ExitCode.DONE
    assert (tmp_path / "store" / "data").exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert prepare_data.main(["rm", "store/data"]) == ExitCode.DONE
    assert not (tmp_path / "store" / "data").exists()


def test_removing_without_a_terminal_needs_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").touch()
    assert prepare_data.main(["rm", "data"]) == ExitCode.USAGE
    assert "--yes" in capsys.readouterr().err
    assert (tmp_path / "data" / "a").exists()
    assert prepare_data.main(["rm", "data", "--yes"]) == ExitCode.DONE
    assert not (tmp_path / "data").exists()


def test_shards_from_elsewhere_are_indexed_and_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.arange(10))
    assert prepare_data.main(["index", str(tmp_path), "--vocab-size", "10"]) == ExitCode.DONE
    assert "1 shard, 10 tokens" in capsys.readouterr().out
    assert prepare_data.main(["inspect", str(tmp_path), "--verify"]) == ExitCode.DONE
    assert "input_ids [10] int64" in capsys.readouterr().out
    (tmp_path / "b.npz").write_bytes(b"<html>")
    assert prepare_data.main(["inspect", str(tmp_path), "--json"]) == ExitCode.USAGE
    output = capsys.readouterr()
    assert json.loads(output.out)["num_bad"] == 1
    assert "b.npz: it is not a whole NPZ file" in output.err
    assert prepare_data.main(["inspect", str(tmp_path / "a.npz")]) == ExitCode.DONE
    assert "a.npz  10 tokens" in capsys.readouterr().out
    assert prepare_data.main(["inspect", str(tmp_path / "b.npz")]) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("b.npz: it is not a whole NPZ file")
    assert prepare_data.main(["inspect", str(tmp_path / "c")]) == ExitCode.USAGE
    assert capsys.readouterr().err == f"Error: {tmp_path / 'c'} does not exist.\n"
    assert prepare_data.main(["index", str(tmp_path)]) == ExitCode.USAGE
    assert "b.npz: it is not a whole NPZ file" in capsys.readouterr().err


def test_an_index_that_cannot_be_read_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.arange(10))
    index = tmp_path / "index.json"
    index.write_bytes(UNREADABLE["torn"])
    for words in (["index", str(tmp_path)], ["inspect", str(tmp_path), "--verify"]):
        assert prepare_data.main(words) == ExitCode.USAGE
        assert f"{index} is not usable" in capsys.readouterr().err
        assert index.read_bytes() == UNREADABLE["torn"]
    assert prepare_data.main(["index", str(tmp_path), "--overwrite"]) == ExitCode.DONE
    assert prepare_data.main(["inspect", str(tmp_path), "--verify"]) == ExitCode.DONE


def test_a_tokenizer_whose_settings_cannot_be_read_is_not_certified(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "index.json").unlink()
    (data / "tokenizer_config.json").write_bytes(UNREADABLE["torn"])
    assert prepare_data.main(["index", str(data)]) == ExitCode.USAGE
    assert f"{data}/tokenizer_config.json cannot be read" in capsys.readouterr().err
    assert not (data / "index.json").exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [(["--json"], "tokenizer.json"), (["--verify"], "tokenizer_config.json")],
)
def test_inspecting_finds_a_damaged_tokenizer(
    data: Path, options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(data / name)
    assert prepare_data.main(["inspect", str(data), *options]) == ExitCode.USAGE
    output = capsys.readouterr()
    assert f"{data}/{name} is damaged or was replaced" in output.err
    if options == ["--json"]:
        assert name in json.loads(output.out)["tokenizer_problem"]
    else:
        assert "6 good shards, 0 bad" in output.out


def test_an_index_again_does_not_certify_a_tokenizer_that_was_damaged(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main(["index", str(data), "--overwrite"]) == ExitCode.DONE
    index = (data / "index.json").read_bytes()
    text = (data / "tokenizer_config.json").read_text().replace('"eos_token"', '"sep_token"')
    (data / "tokenizer_config.json").write_text(text)
    assert prepare_data.main(["index", str(data)]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert f"{data}/tokenizer_config.json is damaged or was replaced" in error
    assert "--overwrite" in error
    assert (data / "index.json").read_bytes() == index
    assert prepare_data.main(["index", str(data), "--overwrite"]) == ExitCode.DONE
    assert (data / "index.json").read_bytes() != index


@pytest.mark.parametrize("command", prepare_data.COMMANDS)
def test_commands_on_nothing_are_one_message_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    words = {"put": ["none", "b"], "get": ["none", "b"]}.get(command, ["none"])
    arguments = [str(tmp_path / word) for word in words]
    assert prepare_data.main([command, *arguments]) == ExitCode.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(text_file: Path, tmp_path: Path) -> None:
    shown = run_in_terminal(SCRIPT, "put", text_file.name, "a", cwd=tmp_path)
    for part in ("Uploading", "verified", "\x1b["):
        assert part in shown
    assert "\x1b" not in run_python(SCRIPT, "put", text_file.name, "b", cwd=tmp_path).stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, sample_output: Path) -> None:
    code = (
        "import resource, sys, scripts.prepare_data as p\n"
        "assert p.main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    line = " ".join(f"word{n * n % 9973}" for n in range(100))
    peaks = []
    for name, size in (("small", 25), ("large", 100)):
        with (tmp_path / f"{name}.txt").open("w") as file:
            for number in range(size * 10**6 // len(line)):
                file.write(f"{number} {line}\n")
        arguments = ["--input", str(tmp_path / f"{name}.txt"), "--quiet", "--token-cache", "off"]
        arguments += ["--tokenizer", str(sample_output), "--shard-tokens", "2000000"]
        result = run_python("-c", code, *arguments, "--output", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout))
    assert peaks[1] < peaks[0] + 50, peaks
