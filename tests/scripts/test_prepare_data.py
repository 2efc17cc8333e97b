import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts import prepare_data
from utils.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture(autouse=True)
def keep_logging() -> None:
    """Leave a handler in place, so that the script adds none that outlives the test."""
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())


@pytest.fixture(scope="module")
def sample_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sample") / "data"
    assert prepare_data.main(["--sample", "--output", str(output), "--quiet"]) == 0
    return output


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {n} of this book.\n" for n in range(300)))
    return path


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own script
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_sample_makes_five_training_shards_and_one_for_validation(sample_output: Path) -> None:
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


def test_sample_again_says_so_at_once(
    sample_output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    code = prepare_data.main(["--sample", "--output", str(sample_output)])

    assert code == ExitCode.DONE
    assert "Already prepared" in capsys.readouterr().out
    assert time.monotonic() - start < 2


def test_summary_shows_what_came_out_and_where(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(text_file), "--vocab-size", "300", "--output", str(tmp_path / "o")]
    assert prepare_data.main(arguments) == ExitCode.DONE
    text = capsys.readouterr().out
    assert prepare_data.main([*arguments, "--json"]) == ExitCode.DONE
    summary = json.loads(capsys.readouterr().out)

    for value in (
        str(tmp_path / "o"),
        f"{summary['tokens']:,}",
        f"{summary['tokens_per_byte']:.3f}",
        f"{summary['unigram_entropy_nats']:.3f} nats",
        "1 training, 1 validation",
    ):
        assert value in text
    assert summary["bytes"] == text_file.stat().st_size
    assert summary["vocab_size"] == 300
    assert summary["is_new"] is False


def test_lines_directories_and_an_existing_tokenizer_go_through(
    text_file: Path, tmp_path: Path, sample_output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = prepare_data.main(
        ["--input", str(text_file.parent), "--document-per", "line", "--json"]
        + ["--tokenizer", str(sample_output), "--output", str(tmp_path / "o")]
    )
    summary = json.loads(capsys.readouterr().out)

    assert code == ExitCode.DONE
    assert (summary["documents"], summary["vocab_size"]) == (300, 4096)


def test_runs_as_a_file_and_as_a_module_from_where_the_user_is(
    text_file: Path, tmp_path: Path
) -> None:
    options = ["--input", text_file.name, "--vocab-size", "300", "--output", "o"]

    by_file = run(str(SCRIPT), *options, cwd=tmp_path)
    by_module = run("-m", "scripts.prepare_data", "--help")

    assert (by_file.returncode, by_module.returncode) == (0, 0)
    assert (tmp_path / "o" / "index.json").exists()
    assert "val_00000.npz" in by_file.stderr
    assert "--sample" in by_module.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, scripts.prepare_data as p\n"
        "try: p.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'tokenizers', 'rich') if m in sys.modules])"
    )

    assert run("-c", code).stdout.endswith("[]\n")


def test_preparing_with_a_new_tokenizer_loads_no_torch(text_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, scripts.prepare_data as p\n"
        f"p.main(['--input', {str(text_file)!r}, '--vocab-size', '300', '--output', "
        f"{str(tmp_path / 'o')!r}])\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )

    assert run("-c", code).stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "300"], "Nothing to prepare"),
        (["--input", "book.txt"], "--vocab-size N"),
        (["--input", "nowhere.txt", "--vocab-size", "300"], "no such file"),
        (["--input", "book.txt", "--vocab-size", "10"], "at least 257"),
        (["--input", "book.txt", "--tokenizer", "book.txt"], "cannot be loaded"),
        (["--sample", "--validation-fraction", "2"], "below 1"),
        (["--sample", "--shard-tokens", "0"], "at least 1"),
        (["--input", "bad.jsonl", "--vocab-size", "300"], "bad.jsonl:1: not JSON"),
    ],
)
def test_bad_request_is_one_message_and_exit_code_two(
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")

    code = prepare_data.main([*arguments, "--output", "o"])

    error = capsys.readouterr().err
    assert code == ExitCode.USAGE
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_unknown_bucket_kind_and_other_data_are_exit_code_two(
    text_file: Path, sample_output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--input", str(text_file), "--vocab-size", "300", "--output"]

    assert prepare_data.main([*options, "ftp://x/y"]) == ExitCode.USAGE
    assert "gs://bucket/prefix" in capsys.readouterr().err
    assert prepare_data.main([*options, str(sample_output)]) == ExitCode.USAGE
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--sample"], ["--output", "o", "--vocab-size", "9", "--tokenizer", "x"]]
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

    again = run(*options, "o", cwd=tmp_path)
    straight = run(*options, "straight", cwd=tmp_path)

    assert (again.returncode, straight.returncode) == (0, 0)
    assert "Going on after" in again.stderr
    assert _contents(tmp_path / "o") == _contents(tmp_path / "straight")


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if not path.name.startswith(".tmp-")
    }
