"""Every command knows the run it stands beside, and an attempt goes on with its configuration."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import (
    checkpoint_viewer,
    evaluate,
    export_model,
    generate,
    monitor_training,
    upload_manager,
)
from tests.conftest import _forget_log_handlers, call_train
from utils.base.errors import ExitCode
from utils.checkpoints.layout import read_json

Train = Callable[..., int]
Said = tuple[int, str, str]
FOUR = "checkpoint-epoch0-step4-files0"
A = ("--run-name", "a")


@pytest.fixture
def run_a(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder, the current one, of a run whose name and bucket only its command line said."""
    settings = ("save_steps=2", "report_to=[]", "run_name=a", "checkpoint_uri=other")
    assert run_train("--config", "test", "--max-steps", "4", settings=settings) == 0
    assert f"Verified {FOUR} in the bucket" in capsys.readouterr().out
    _forget_log_handlers()
    return tmp_path / "run"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(script: object, *words: object) -> Said:
        code = script.main([str(word) for word in words])  # type: ignore[attr-defined]
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_every_command_says_what_the_run_said(
    run_a: Path, call: Callable[..., Said], sample_data: Path
) -> None:
    def read(script: object, *words: object) -> object:
        code, out, _ = call(script, *words, *A, "--json")
        assert code == 0
        return json.loads(out)

    status = read(upload_manager, "status")
    assert (status["bucket"], status["queue"]) == ("other/a", [])
    assert [row["state"] for row in status["checkpoints"]] == ["verified", "verified"]
    assert len(read(upload_manager, "list", "--remote")) == 2
    verified = read(upload_manager, "verify", "--deep")["checkpoints"]
    assert [row["verified"] for row in verified] == [True, True]
    assert read(upload_manager, "upload-all") == {"verified": [], "failed": {}}
    assert read(upload_manager, "download", "latest", "--to", "there")["checkpoint"] == FOUR
    for words in ([], ["--remote"]):
        rows = read(checkpoint_viewer, "list", *words)["checkpoints"]
        assert [row["state"] for row in rows] == ["verified", "verified"]
    assert read(checkpoint_viewer, "view", "latest", "--remote")["config"]["run_name"] == "a"
    looked = read(monitor_training, "--once")
    assert (looked["state"], looked["uploads"]) == ("finished", {"verified": 2})
    measured = read(evaluate, "latest", "--max-tokens", "64")
    assert measured["evaluations"][0]["how"]["data"] == str(sample_data)
    assert measured["log"] == "logs/a/evaluations.jsonl"
    assert call(generate, "latest", *A, "--prompt", "The", "--max-tokens", "2")[0] == 0
    assert read(export_model, "best", "--output", "exported")["model"] == FOUR
    assert sorted(path.name for path in run_a.iterdir() if path.is_dir()) == [
        *("cache", "checkpoints", "exported", "logs", "other", "there"),
    ]
    code, _, err = call(generate, "exported", "--prompt", "The", "--max-tokens", "2")
    assert (code, "There is no run" in err) == (0, False)  # it needs none
    err = call(generate, "--prompt", "The")[2]
    assert ("There is no run in checkpoints itself" in err, "Did you mean" in err) == (True, False)


def test_without_a_name_the_latest_is_meant_and_view_prints_the_command_that_shows_all_of_it(
    run_a: Path, call: Callable[..., Said]
) -> None:
    for words in ((), ("--remote",), (f"checkpoints/a/{FOUR}",)):
        _, out, _ = call(checkpoint_viewer, "view", *words, *A)
        python, script, *proposed = shlex.split(out.splitlines()[-1])
        assert (python, script) == ("python", "scripts/checkpoint_viewer.py")
        code, out, _ = call(checkpoint_viewer, *proposed)
        assert (code, f"Checkpoint Summary: {FOUR}" in out, "\nFiles:" in out) == (0, True, True)
    assert call(generate, *A, "--prompt", "The", "--max-tokens", "2")[0] == 0
    _, out, _ = call(evaluate, "--max-tokens", "64", "--json", *A)
    assert [one["model"] for one in json.loads(out)["evaluations"]] == [FOUR]
    shutil.rmtree(run_a / "checkpoints" / "a" / FOUR.replace("4", "2"))
    _, _, err = call(checkpoint_viewer, "compare", "2", "4", "--weights", *A, "--remote")
    assert f"upload_manager.py download {FOUR.replace('4', '2')} --run-name a" in err


@pytest.mark.usefixtures("run_a")
def test_what_is_no_checkpoint_of_a_named_run_is_told_with_those_that_are(
    call: Callable[..., Said],
) -> None:
    never = FOUR.replace("4", "15")
    for script, *words in (
        (generate, "--prompt", "x"),
        (evaluate,),
        (export_model, "--output", "there"),
        (upload_manager, "download", "--to", "there"),
    ):
        for name in ("nope", never):
            place = words[:1] if script is upload_manager else []
            code, _, err = call(script, *place, name, *words[len(place) :], *A)
            assert (code, f"There is no checkpoint '{name}'" in err) == (ExitCode.USAGE, True)
            assert (FOUR in err, "connect" in err) == (True, False)


def test_a_checkpoint_that_is_nowhere_is_told_with_those_here_and_in_the_bucket(
    run_a: Path, call: Callable[..., Said]
) -> None:
    shutil.rmtree(run_a / "checkpoints" / "a" / FOUR.replace("4", "2"))
    code, _, err = call(generate, "999", *A, "--prompt", "x")
    assert code == ExitCode.USAGE
    here, there = err.split("In the bucket:")
    assert (FOUR in here, "step2" in here) == (True, False)
    assert (FOUR in there, "step2" in there) == (True, True)
    for words in (("view", "2"), ("compare",), ("view", "latest", "--output-dir", "nowhere")):
        code, _, err = call(checkpoint_viewer, *words, *A)
        assert (code, "--remote looks in" in err) == (ExitCode.USAGE, True), words
    assert call(checkpoint_viewer, "view", "2", *A, "--remote")[0] == 0


@pytest.mark.usefixtures("run_a")
def test_a_checkpoint_that_is_mistyped_is_asked_of_nobody_else(call: Callable[..., Said]) -> None:
    for script, *words in (
        (generate, "lastest", "--prompt", "x"),
        (evaluate, "lastest"),
        (export_model, "lastest", "--output", "there"),
        (checkpoint_viewer, "view", "lastest"),
        (upload_manager, "download", "lastest", "--to", "there"),
    ):
        code, _, err = call(script, *words, *A)
        assert (code, "Did you mean latest?" in err) == (ExitCode.USAGE, True), script
    near = FOUR.replace("check", "chek")
    assert f"Did you mean {FOUR}?" in call(generate, near, *A, "--prompt", "x")[2]


def test_the_run_is_found_by_its_directory_from_anywhere_and_as_a_copy(
    run_a: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = shutil.copytree(run_a / "checkpoints" / "a", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    own = run_a / "checkpoints" / "a"
    for place in (own, copy, "copy", own / FOUR):
        code, out, _ = call(upload_manager, "verify", "--run", place)
        assert (code, out.splitlines()[-1]) == (0, "2 verified, 0 not.")
        code, out, _ = call(monitor_training, "--once", "--json", "--run", place)
        assert json.loads(out)["state"] == "finished"
    assert call(upload_manager, "verify", "--config", own / FOUR)[0] == 0
    for place in (own, own / FOUR):
        monkeypatch.chdir(place)
        assert call(upload_manager, "verify", "--run", ".")[0] == 0
    monkeypatch.chdir(run_a)
    (copy / "run.json").unlink()  # of an earlier version: the newest checkpoint says it
    words = ("--run", copy, "--set", "checkpoint_uri=other")
    assert call(upload_manager, "verify", *words)[0] == 0
    assert call(upload_manager, "verify", "--run", copy)[0] == ExitCode.USAGE  # where is it?
    code, _, err = call(upload_manager, "verify", "--run", copy, *A)
    assert (code, "takes no" in err) == (ExitCode.USAGE, True)


def test_what_the_words_say_wins_and_a_named_configuration_that_differs_is_told(
    run_a: Path, call: Callable[..., Said], caplog: pytest.LogCaptureFixture
) -> None:
    assert call(checkpoint_viewer, "list", *A)[0] == 0
    assert not caplog.messages
    assert call(checkpoint_viewer, "view", "best", *A, "--config", "test")[0] == 0
    (told,) = caplog.messages
    assert "checkpoint_uri is other, not bucket" in told
    assert "--set checkpoint_uri=bucket" in told
    _, out, _ = call(upload_manager, "status", *A, "--json", "--set", "checkpoint_uri=third")
    assert json.loads(out)["bucket"] == "third/a"


@pytest.mark.usefixtures("run_a")
def test_where_no_run_is_those_that_are_there_are_named(
    call: Callable[..., Said], caplog: pytest.LogCaptureFixture
) -> None:
    for words, code, lack in (
        ([], 0, f"No checkpoints in {Path.cwd()}/checkpoints."),
        (["--run-name", "b"], 2, f"{Path.cwd()}/checkpoints/b does not exist. Name the run: "),
    ):
        said = call(checkpoint_viewer, "list", *words)
        assert (said[0], lack in said[1] + said[2]) == (code, True)
        assert "Runs in checkpoints: a (--run-name a)." in caplog.messages[-1]
    (Path("checkpoints") / "a").rename("checkpoints/int")
    call(checkpoint_viewer, "list", "--run-name", "itn")
    told = "There is no run in checkpoints/itn. Did you mean int? Runs in checkpoints: "
    assert told in caplog.messages[-1]
    for folder in ("more", "own"):
        shutil.copytree("checkpoints/int", Path("checkpoints") / folder)
    call(checkpoint_viewer, "list", "--run", "checkpoints")
    told = "Runs in checkpoints: int (--run checkpoints/int), more, own."
    assert told in caplog.messages[-1]


def test_an_end_between_two_logged_steps_has_the_same_figures_everywhere(
    run_train: Train, call: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("logging_steps=2", "run_name=a", "checkpoint_uri=", "report_to=[]")
    words = ("--max-steps", "6", "--stop-after", "3", "--quiet")
    assert run_train(*words, settings=settings) == 0
    _forget_log_handlers()
    capsys.readouterr()
    (row,) = json.loads(call(checkpoint_viewer, "list", *A, "--json")[1])["checkpoints"]
    assert row["tokens_seen"] == 3 * 4 * 32
    seen = json.loads(call(monitor_training, "--once", "--json", *A)[1])
    for key, own in (("tokens_seen", "tokens_seen"), ("loss", "current_loss")):
        assert seen["metrics"][key] == row[own]
    assert call(checkpoint_viewer, "report", *A)[0] == 0
    page = Path("run.html").read_text("utf-8")
    assert ("<dd>384</dd>" in page, "<dd>256</dd>" in page) == (True, False)


def test_compare_and_plot_take_checkpoints_of_two_runs(
    run_a: Path, run_train: Train, call: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("run_name=b", "learning_rate=0.002", "report_to=[]", "checkpoint_uri=")
    assert run_train("--max-steps", "3", "--quiet", settings=settings) == 0
    _forget_log_handlers()
    capsys.readouterr()
    runs = ("--run", "checkpoints/a", "--run", "checkpoints/b")
    paths = (f"checkpoints/a/{FOUR}", "checkpoints/b/checkpoint-epoch0-step3-files0")
    for words in (runs, paths):
        _, out, _ = call(checkpoint_viewer, "compare", "--json", *words)
        found = json.loads(out)
        assert [row["step"] for row in found["checkpoints"]] == [4, 3]
        assert [row["state"] for row in found["checkpoints"]] == ["verified", "not queued"]
        assert found["config_differences"]["learning_rate"] == [0.004, 0.002]
        _, out, _ = call(checkpoint_viewer, "plot", "--json", *words)
        labels = [curve["label"] for curve in json.loads(out)["curves"]]
        assert [label.endswith(Path(path).name) for label, path in zip(labels, paths, strict=True)]
        assert len(set(labels)) == 2
    assert call(checkpoint_viewer, "list", *runs)[0] == ExitCode.USAGE


def test_an_attempt_without_config_goes_on_with_that_of_the_checkpoint_from_wherever_it_is(
    run_a: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Callable[..., Said]
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")  # a machine that has nothing
    assert call_train(["--resume", f"{run_a}/other/a/latest", "--max-steps", "5"]) == 0
    assert steps_in(tmp_path / "new" / "checkpoints" / "a") == [4, 5]
    assert steps_in(run_a / "other" / "a" / "Checkpoints", ".tar.gz") == [2, 4, 5]

    path = str(run_a / "checkpoints" / "a" / FOUR)
    assert call_train(["--resume", path, "--max-steps", "6", "--set", "run_name=a"]) == 0
    assert steps_in(run_a / "checkpoints" / "a") == [2, 4, 6]

    monkeypatch.chdir(run_a)
    shutil.rmtree("checkpoints")
    words = ("--resume", "latest", "--set", "checkpoint_uri=other", "--set", "run_name=a")
    assert call_train([*words, "--max-steps", "7", "--set", "learning_rate=0.1"]) == ExitCode.USAGE
    assert not Path("checkpoints").exists()  # refused before anything is downloaded
    assert call_train([*words, "--max-steps", "7"]) == 0
    assert read_json(run_a / "checkpoints" / "a" / "run.json")["config"]["sequence_length"] == 32
    assert call(upload_manager, "verify", *A)[0] == 0


def test_a_copy_of_a_runs_bucket_is_gone_on_with_where_it_is(run_a: Path) -> None:
    folders = [run_a / "other" / name / "Checkpoints" for name in ("a", "copy")]
    shutil.copytree(folders[0], folders[1])
    assert call_train(["--resume", "other/copy/latest", "--max-steps", "5", "--quiet"]) == 0
    assert [steps_in(folder, ".tar.gz") for folder in folders] == [[2, 4], [2, 4, 5]]
    assert steps_in(run_a / "checkpoints" / "copy") == [4, 5]


def test_a_key_of_a_newer_version_is_told_wherever_it_was_recorded(
    run_a: Path, call: Callable[..., Said], caplog: pytest.LogCaptureFixture
) -> None:
    record = run_a / "checkpoints" / "a" / "run.json"
    value = read_json(record)
    value["config"]["flux"] = 3
    record.write_text(json.dumps(value))
    (run_a / "training_config.json").write_text(json.dumps(value["config"]))
    for code, words in ((0, A), (2, ("--config", "training_config.json", "--output-dir", "none"))):
        assert call(checkpoint_viewer, "list", *words)[0] == code
        assert "flux is ignored: this version does not know" in caplog.text
        caplog.clear()


def test_a_bucket_of_an_earlier_version_wants_the_configuration_said(
    run_a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run_a / "other" / "a" / "Checkpoints").glob("*.json"):
        value = read_json(path)
        del value["config"]
        path.write_text(json.dumps(value))
    assert call_train(["--resume", "other/a/latest"]) == ExitCode.USAGE
    assert "--config NAME" in capsys.readouterr().err


def test_a_checkpoint_is_a_configuration(run_a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in (f"checkpoints/a/{FOUR}", f"checkpoints/a/{FOUR}/training_config.json"):
        assert call_train(["--config", where, "--dry-run", "--json", "--set", "run_name=b"]) == 0
        found = json.loads(capsys.readouterr().out)["config"]
        own = read_json(run_a / "checkpoints" / "a" / FOUR / "training_config.json")
        assert found == {**own, "run_name": "b"}


def test_a_resume_that_finds_nothing_names_a_run_of_a_similar_name(
    run_a: Path, run_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_a / "checkpoints" / "a").rename(run_a / "checkpoints" / "first")
    words = ("--max-steps", "1", "--resume", "latest")
    settings = ("run_name=frist", "report_to=[]")
    assert run_train(*words, settings=settings) == ExitCode.USAGE
    assert "(--set run_name=first). To begin a new one: --config NAME." in capsys.readouterr().err
    inside = ("output_dir=checkpoints/first", *settings)
    assert run_train(*words, settings=inside) == ExitCode.USAGE
    assert "one without a name (--set run_name='')." in capsys.readouterr().err
    assert run_train(*words, "--config", "test", settings=settings) == 0
    assert "--set run_name=first" in capsys.readouterr().out


def test_a_run_that_was_moved_or_copied_never_uses_the_bucket_of_another_place(
    run_a: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (run_a / "checkpoints" / "a").rename(run_a / "checkpoints" / "b")
    for words in (A[:1] + ("b",), ("--output-dir", "checkpoints/b"), ("--run", "checkpoints/b")):
        status = json.loads(call(upload_manager, "status", "--json", *words)[1])
        assert status["bucket"] == "other/a", words

    copy = shutil.copytree(run_a, tmp_path / "copy")
    monkeypatch.chdir(copy)
    status = json.loads(call(upload_manager, "status", "--json", "--run-name", "b")[1])
    assert Path(status["bucket"]).resolve() == copy / "other" / "a"

    (copy / "checkpoints" / "b").rename(copy / "elsewhere")
    words = ("--run", "elsewhere")
    assert call(upload_manager, "upload-all", *words)[0] == ExitCode.USAGE
    assert call_train(["--resume", "latest", "--set", "output_dir=elsewhere"]) == ExitCode.USAGE
    status = json.loads(call(upload_manager, "status", "--json", *words)[1])
    assert (status["bucket"], len(status["checkpoints"])) == (None, 2)


def steps_in(directory: Path, suffix: str = "") -> list[int]:
    names = (path.name.removesuffix(suffix) for path in directory.glob(f"checkpoint-*{suffix}"))
    return sorted(int(name.split("-")[2].removeprefix("step")) for name in names)
