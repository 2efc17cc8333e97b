import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.training_config import PROJECT_DIRECTORY
from scripts.checkpoint_viewer import main, show_time
from tests.sample_checkpoints import RUN_ID, make_checkpoint, make_history, put_remote, seal
from utils.journal import Journal, UploadState

SCRIPT = PROJECT_DIRECTORY / "scripts" / "checkpoint_viewer.py"
PNG_SIGNATURE = b"\x89PNG"


@pytest.fixture(autouse=True)
def _work_in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_checkpoints(tmp_path):
    directory = tmp_path / "checkpoints"
    paths = [make_checkpoint(directory, step) for step in (50, 100)]
    journal = Journal(directory / "uploads.jsonl")
    journal.record(paths[0].name, RUN_ID, UploadState.VERIFIED, destination="bucket/a.tar.gz")
    journal.record(paths[1].name, RUN_ID, UploadState.FAILED, error="403 Forbidden")
    return paths


def run(capsys, *argv):
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=pytest.fail)


def run_process(*command, cwd):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_DIRECTORY)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_list_of_nothing_says_so(capsys):
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    assert "No checkpoints in checkpoints." in out
    assert run_json(capsys, "list")["checkpoints"] == []


@pytest.mark.usefixtures("two_checkpoints")
def test_list_shows_step_losses_time_upload_state_latest_and_best(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "Found 2 checkpoints in checkpoints" in out
    first, second = (line for line in out.splitlines() if "checkpoint-epoch0-step" in line)
    assert first.startswith(" 1. checkpoint-epoch0-step50-files0 ")
    for part in ("Step: 50 ", "Loss: 6.464046", "Val: 6.564046", "Time: 2026-01-01 12:30:25"):
        assert part in first
    assert first.endswith("Upload: verified")
    assert second.endswith("Upload: failed (latest, best)")


def test_damaged_and_foreign_things_are_named_and_the_rest_is_listed(capsys, two_checkpoints):
    directory = two_checkpoints[0].parent
    (two_checkpoints[0] / "metadata.json").write_text('{"step": ')
    (directory / "checkpoint-epoch0-step200-files0").mkdir()
    (directory / "checkpoint-epoch0-step300-files0").write_text("a file")
    (directory / "checkpoint-\x1b[2J").mkdir()
    (directory / "uploads.jsonl").unlink()
    (directory / "uploads.jsonl").mkdir()
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "Problem: metadata.json cannot be read" in out
    assert "Note: checkpoint-epoch0-step200-files0 is not listed" in out
    assert "Note: checkpoint-epoch0-step300-files0 is not listed" in out
    assert "Note: upload states are unknown" in out
    assert "Step: 100 " in out
    assert "\x1b" not in out


def test_hostile_metadata_reaches_the_terminal_as_plain_text(capsys, tmp_path):
    make_checkpoint(
        tmp_path / "checkpoints",
        50,
        timestamp="\x1b]0;owned\x07",
        run_id={"a": 1},
        git_commit="\x1b[31m" * 1000,
        current_loss=10**400,
        loss_history=["x", None, math.nan, True, 2.0],
        learning_rates="none",
        validation_metrics={"\x1b[2J": "\x1b[2J", "deep": [[["\x1b"]]]},
        training_progress=[1],
        system_info=7,
    )
    for command in (["list"], ["view", "50"], ["compare", "50", "50"]):
        code, out, err = run(capsys, *command)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        assert "\x07" not in out
    assert run_json(capsys, "view", "50")["loss_statistics"]["length"] == 1


def test_view_shows_everything_of_the_users_example(capsys, two_checkpoints):
    code, out, _ = run(capsys, "view", two_checkpoints[0].name)
    assert code == 0
    for line in (
        "Checkpoint Summary: checkpoint-epoch0-step50-files0",
        "Timestamp: 2026-01-01T12:30:25.123456+00:00",
        "Step: 50",
        "Epoch: 0",
        "Files Processed: 0",
        "CUDA Available: False",
        "GPU Count: 0",
        "Mixed Precision: no",
        "Current Loss: 6.464046",
        "Best Loss: 6.464046",
        "Loss History Length: 5",
        "Average Loss: 7.161749",
        "Loss Std Dev: 0.506085",
        "Current LR: 4.00e-03",
        "LR History Length: 5",
        "  current_avg_loss: 6.464046",
        "  steps_since_best: 0",
        "  loss_trend: improving",
    ):
        assert line in out.splitlines()
    assert "Loss Trend: " in out


def test_view_shows_progress_position_run_upload_and_files(capsys, two_checkpoints):
    _, out, _ = run(capsys, "view", "50")
    for line in (
        "  validation_loss: 6.564046",
        "  perplexity: 709.135413",
        "Tokens Seen: 102,400",
        "Tokens/s: 3,400",
        "  sample_index: 200",
        "  num_shards: 1",
        f"Run ID: {RUN_ID}",
        "Git Commit: 0123456789abcdef0123456789abcdef01234567",
        "Parameters: 5,256,704",
        "  destination: bucket/a.tar.gz",
        "  model.safetensors           700 B",
    ):
        assert line in out.splitlines()
    assert "State: verified (" in out
    _, out, _ = run(capsys, "view", "100")
    assert "  error: 403 Forbidden" in out


def test_view_names_files_that_are_missing_or_of_another_size(capsys, two_checkpoints):
    (two_checkpoints[0] / "model.safetensors").write_bytes(b"short")
    (two_checkpoints[0] / "data_state.json").unlink()
    code, out, _ = run(capsys, "view", "50")
    assert code == 0
    assert "model.safetensors has 5 bytes, the manifest says 700" in out
    assert "data_state.json is missing" in out
    assert len(run_json(capsys, "view", "50")["problems"]) == 3


@pytest.mark.usefixtures("two_checkpoints")
def test_view_as_json_has_metadata_files_and_upload(capsys):
    value = run_json(capsys, "view", "latest")
    assert value["step"] == 100
    assert value["metadata"]["run_id"] == RUN_ID
    assert value["upload"]["details"] == {"error": "403 Forbidden"}
    assert {"name", "size_bytes", "crc32c"} == value["files"][0].keys()
    assert value["data_position"]["sample_index"] == 400
    assert value["problems"] == []


def test_compare_takes_the_two_newest_by_default(capsys, tmp_path, two_checkpoints):
    make_checkpoint(tmp_path / "checkpoints", 150, config={"learning_rate": 0.1, "max_steps": 100})
    code, out, _ = run(capsys, "compare")
    assert code == 0
    assert "[1] checkpoint-epoch0-step100-files0" in out
    assert "[2] checkpoint-epoch0-step150-files0" in out
    assert "step50-" not in out
    rows = {line[:21].strip(): line.split() for line in out.splitlines()}
    assert rows["Loss"][-3:] == ["5.034204", "3.920642", "-1.113562"]
    assert rows["Tokens Seen"][-1] == "+102,400"
    assert "  learning_rate: 0.004 | 0.1" in out
    assert "max_steps" not in out


@pytest.mark.usefixtures("two_checkpoints")
def test_compare_shows_any_number(capsys):
    value = run_json(capsys, "compare", "50", "best", "latest")
    assert [row["step"] for row in value["checkpoints"]] == [50, 100, 100]
    assert value["config_differences"] == {}


def test_compare_says_which_configuration_cannot_be_read(capsys, two_checkpoints):
    (two_checkpoints[1] / "training_config.json").write_text("[]")
    code, out, _ = run(capsys, "compare")
    assert code == 0
    assert "unknown: checkpoint-epoch0-step100-files0: training_config.json cannot be read" in out


@pytest.mark.usefixtures("two_checkpoints")
def test_plot_writes_a_picture_of_the_checkpoints_name(capsys, tmp_path):
    code, out, _ = run(capsys, "plot", "100")
    assert code == 0
    assert "Plot saved to checkpoint-epoch0-step100-files0.png" in out
    picture = tmp_path / "checkpoint-epoch0-step100-files0.png"
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.usefixtures("two_checkpoints")
def test_plot_saves_where_it_is_told(capsys, tmp_path):
    value = run_json(capsys, "plot", "latest", "--save", "curve.svg")
    assert value["saved"] == "curve.svg"
    assert value["loss_points"] == 10
    assert value["validation_points"] == 1
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_plot_draws_what_is_left_of_a_damaged_history(capsys, two_checkpoints):
    path = two_checkpoints[1] / "training_metrics.json"
    damaged = {**make_history(100), "loss_history": [math.nan, "x", 1.0], "validation": [1, {}]}
    path.write_text(json.dumps(damaged))
    assert run_json(capsys, "plot", "100")["loss_points"] == 1
    path.write_text("{")
    value = run_json(capsys, "plot", "100")
    assert value["loss_points"] == 10
    assert "training_metrics.json cannot be read" in value["problem"]


def test_plot_before_the_first_logged_loss_is_an_error(capsys, tmp_path):
    path = make_checkpoint(tmp_path / "checkpoints", 5, loss_history=[], learning_rates=[])
    (path / "training_metrics.json").write_text(json.dumps({**make_history(5), "validation": []}))
    seal(path, 5)
    code, _, err = run(capsys, "plot", "5")
    assert code == 2
    assert "no curve" in err


def test_remote_reads_the_buckets_cards(capsys, tmp_path, two_checkpoints):
    put_remote(tmp_path / "bucket" / "my-run", two_checkpoints[0])
    options = ("--remote", "--run-name", "my-run")
    code, out, _ = run(capsys, "list", *options)
    assert code == 0
    assert "Found 1 checkpoint in bucket/my-run" in out
    assert "Upload: in bucket (latest, best)" in out
    code, out, _ = run(capsys, "view", "50", *options)
    assert "Archive: 7 B" in out
    assert "Loss History Length: 5" in out
    assert run_json(capsys, "plot", "50", *options)["loss_points"] == 5
    assert run_json(capsys, "list", "--remote")["checkpoints"] == []


@pytest.mark.usefixtures("two_checkpoints")
def test_output_dir_and_run_name_say_where_to_look(capsys, tmp_path):
    make_checkpoint(tmp_path / "else" / "my-run", 7)
    rows = run_json(capsys, "list", "--output-dir", "else", "--run-name", "my-run")["checkpoints"]
    assert [row["step"] for row in rows] == [7]


@pytest.mark.usefixtures("two_checkpoints")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["view", "51"], "There is no checkpoint '51'"),
        (["view", "../../etc"], "There is no checkpoint"),
        (["compare", "50"], "compare needs at least two checkpoints, 1 named"),
        (["compare", "--output-dir", "nowhere"], "0 in nowhere"),
        (["list", "--config", "tset"], "Known names"),
        (["list", "--run-name", "../x"], "run_name '../x'"),
        (["list", "--remote", "--config", "no_bucket.json"], "no checkpoint_uri"),
        (["plot", "50", "--save", "a.docx"], "must end in one of"),
        (["plot", "50", "--save", "nowhere/a.png"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(capsys, tmp_path, argv, message):
    (tmp_path / "no_bucket.json").write_text('{"model": "neox-tiny"}')
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["lsit"], ["view"], ["list", "--nonsense"]])
def test_unknown_command_lines_exit_with_2(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("timestamp", "shown"),
    [
        ("2026-01-01T12:00:00+00:00", "2026-01-01 12:00:00"),
        ("2026-01-01T12:00:00Z", "2026-01-01 12:00:00"),
        ("2026-01-01T12:00:00.5+02:00", "2026-01-01 10:00:00"),
        ("2024-01-15T14:30:25.123456", "2024-01-15 14:30:25"),
        ("0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00"),
        ("yesterday", "yesterday"),
        (None, "-"),
        (7, "7"),
    ],
)
def test_times_are_shown_in_utc(timestamp, shown):
    assert show_time(timestamp) == shown


@pytest.mark.usefixtures("two_checkpoints")
def test_viewer_loads_neither_torch_nor_drawing_nor_cloud_libraries(tmp_path):
    code = (
        "import sys; from scripts.checkpoint_viewer import main\n"
        "assert main(['list']) == 0 and main(['view', 'latest']) == 0 and main(['compare']) == 0\n"
        "heavy = ('torch', 'transformers', 'numpy', 'matplotlib', 'rich', 'google.cloud.storage')\n"
        "assert not [name for name in heavy if name in sys.modules]"
    )
    result = run_process(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("two_checkpoints")
def test_script_works_by_path_and_as_a_module_from_any_directory(tmp_path):
    by_path = subprocess.run(
        [sys.executable, SCRIPT, "list"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    module = (sys.executable, "-m", "scripts.checkpoint_viewer", "list")
    assert run_process(*module, cwd=tmp_path).stdout == by_path.stdout
    assert "Found 2 checkpoints" in by_path.stdout


@pytest.mark.usefixtures("two_checkpoints")
def test_terminal_without_arrows_gets_the_word(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, SCRIPT, "view", "50"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Loss Trend: improving\n" in result.stdout


def test_reading_changes_no_file(capsys, tmp_path, two_checkpoints):
    put_remote(tmp_path / "bucket", two_checkpoints[0])
    before = _snapshot(tmp_path)
    for argv in (["list"], ["view", "50"], ["compare"], ["list", "--remote"]):
        assert run(capsys, *argv)[0] == 0
    assert _snapshot(tmp_path) == before


def _snapshot(directory: Path):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
