import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from configs.config_files import PROJECT_DIRECTORY
from scripts.checkpoint_viewer import main
from tests.processes import run_in_terminal, run_python
from tests.sample_checkpoints import (
    RUN_ID,
    make_checkpoint,
    make_history,
    make_metadata,
    put_remote,
    seal,
)
from tests.screens import find_misfits
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import find_checkpoints
from utils.storage.bucket import crc32c_of_file
from utils.storage.directory import DirectoryBucket
from utils.tools.viewer import shelf
from utils.tools.viewer.text import show_time

SCRIPT = PROJECT_DIRECTORY / "scripts" / "checkpoint_viewer.py"
PNG_SIGNATURE = b"\x89PNG"


@pytest.fixture(autouse=True)
def _work_in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_checkpoints(tmp_path):
    directory = tmp_path / "checkpoints"
    progress = {**make_metadata(50)["training_progress"], "mfu": 0.412}
    paths = [
        make_checkpoint(directory, 50, training_progress=progress),
        make_checkpoint(directory, 100),
    ]
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


def test_list_of_no_run_is_refused_and_of_one_without_checkpoints_says_so(capsys, tmp_path):
    lack = f"Error: {tmp_path / 'checkpoints'} does not exist. Name the run: --run-name NAME"
    for words in ([], ["--json"]):
        code, out, err = run(capsys, "list", *words)
        assert (code, out, err[: len(lack)]) == (2, "", lack)
    (tmp_path / "checkpoints").mkdir()
    assert run_json(capsys, "list")["checkpoints"] == []
    (tmp_path / "checkpoints/run.json").write_text("{}")  # it trains, and has saved nothing yet
    code, out, err = run(capsys, "list", "--output-dir", "checkpoints")
    assert (code, err) == (0, "")
    assert out.startswith(f"No checkpoints in {tmp_path / 'checkpoints'}.\n")
    assert "monitor_training.py --output-dir checkpoints shows where the run is." in out


def test_a_run_below_another_ones_directory_is_named(capsys, tmp_path):
    make_checkpoint(tmp_path / "checkpoints/a", 50)
    (tmp_path / "checkpoints/a/run.json").write_text("{}")
    (tmp_path / "checkpoints/other").mkdir()
    make_checkpoint(tmp_path / "checkpoints", 100)
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert out.endswith("\nNote: checkpoints/a is another run with 1 checkpoint: --run-name a.\n")
    found = run_json(capsys, "list")
    assert [row["step"] for row in found["checkpoints"]] == [100]
    assert len(found["notes"]) == 1
    assert [row["step"] for row in run_json(capsys, "list", "--run-name", "a")["checkpoints"]] == [
        50
    ]


@pytest.mark.usefixtures("two_checkpoints")
def test_list_shows_step_losses_time_upload_state_latest_and_best(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "Found 2 checkpoints in checkpoints" in out
    first, second = (line for line in out.splitlines() if "checkpoint-epoch0-step" in line)
    assert first.startswith(" 1. checkpoint-epoch0-step50-files0 ")
    for part in ("Step: 50 ", "Loss: 6.464046", "Val: 6.564046", "Time: 2026-01-01 12:30:25"):
        assert part in first
    assert first.endswith("Upload: verified Kept: newest 3")
    assert second.endswith("Upload: failed (latest, best) Kept: latest")
    row = run_json(capsys, "list")["checkpoints"][0]
    assert (row["state"], row["kept"], row["is_latest"]) == ("verified", "newest 3", False)
    assert row["age_seconds"] > 86400
    assert row["learning_rate"] == 0.004


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


def test_view_shows_everything_of_the_users_example_and_more(
    capsys: pytest.CaptureFixture[str], two_checkpoints: list[Path]
) -> None:
    code, out, _ = run(capsys, "view", two_checkpoints[0].name, "--all")
    assert code == 0
    lines = out.splitlines()
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
        "  validation_loss: 6.564046",
        "  perplexity: 709.135413",
        "Tokens Seen: 102,400",
        "Tokens/s: 3,400",
        "MFU: 41.2%",
        "  sample_index: 200",
        "  num_shards: 1",
        f"Run ID: {RUN_ID}",
        "Git Commit: 0123456789abcdef0123456789abcdef01234567",
        "Parameters: 5,256,704",
        "  destination: bucket/a.tar.gz",
        "  learning_rate: 0.004",
    ):
        assert line in lines
    assert ["model.safetensors", "700", "B", "UH9VIA=="] in [line.split() for line in lines]
    assert "Loss Trend: " in out
    assert "State: verified (" in out
    (curve,) = (line for line in lines if line.startswith("Loss Curve: "))
    assert curve.split()[2][0] == "\u2588"
    assert curve.endswith(" 7.895204 to 6.464046")
    assert "  error: 403 Forbidden" in run(capsys, "view", "100")[1]


def test_view_names_files_that_are_missing_or_of_another_size(capsys, two_checkpoints):
    (two_checkpoints[0] / "model.safetensors").write_bytes(b"short")
    (two_checkpoints[0] / "data_state.json").unlink()
    code, out, _ = run(capsys, "view", "50")
    assert code == 0
    assert "model.safetensors has 5 bytes, the manifest says 700" in out
    assert "data_state.json is missing" in out
    assert len(run_json(capsys, "view", "50")["problems"]) == 3


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


def test_compare_says_which_configuration_cannot_be_read(capsys, two_checkpoints):
    (two_checkpoints[1] / "training_config.json").write_text("[]")
    code, out, _ = run(capsys, "compare")
    assert code == 0
    assert "unknown: checkpoint-epoch0-step100-files0: training_config.json cannot be read" in out


@pytest.mark.usefixtures("two_checkpoints")
def test_plot_writes_a_picture(capsys, tmp_path):
    code, out, _ = run(capsys, "plot", "100")
    assert code == 0
    assert "Plot saved to checkpoint-epoch0-step100-files0.png" in out
    picture = tmp_path / "checkpoint-epoch0-step100-files0.png"
    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    value = run_json(capsys, "plot", "latest")
    assert value["saved"] is None
    (curves,) = value["curves"]
    assert curves["checkpoint"] == curves["label"] == "checkpoint-epoch0-step100-files0"
    assert curves["series"]["loss"]["steps"] == list(range(10, 101, 10))
    assert curves["series"]["validation_loss"]["steps"] == [100]


def test_plot_draws_what_is_left_of_a_damaged_history(capsys, two_checkpoints):
    path = two_checkpoints[1] / "training_metrics.json"
    damaged = {**make_history(100), "loss_history": [math.nan, "x", 1.0], "validation": [1, {}]}
    path.write_text(json.dumps(damaged))
    (curves,) = run_json(capsys, "plot", "100")["curves"]
    assert curves["series"]["loss"] == {"steps": [10, 20, 30], "values": [None, None, 1.0]}
    path.write_text("{")
    value = run_json(capsys, "plot", "100")
    (curves,) = value["curves"]
    assert (curves["has_steps"], len(curves["series"]["loss"]["values"])) == (False, 10)
    assert "training_metrics.json cannot be read" in value["notes"][0]
    metadata = json.loads((two_checkpoints[1] / "metadata.json").read_text())
    empty = {**metadata, "loss_history": [], "learning_rates": []}
    (two_checkpoints[1] / "metadata.json").write_text(json.dumps(empty))
    code, _, err = run(capsys, "plot", "100")
    assert (code, "no curve" in err) == (2, True)


def test_remote_reads_the_buckets_sidecars(capsys, tmp_path, two_checkpoints):
    put_remote(tmp_path / "bucket" / "my-run", two_checkpoints[0])
    options = ("--remote", "--run-name", "my-run")
    code, out, _ = run(capsys, "list", *options)
    assert code == 0
    assert "Found 1 checkpoint in bucket/my-run" in out
    assert "Upload: verified (latest, best)" in out
    code, out, _ = run(capsys, "view", "50", *options)
    assert "Archive: 7 B" in out
    assert "Loss History Length: 5" in out
    assert run_json(capsys, "list", "--remote")["checkpoints"] == []
    for path in two_checkpoints:
        put_remote(tmp_path / "bucket", path)
    assert "Archives: 14 B in all." in run(capsys, "list", "--remote")[1]
    value = run_json(capsys, "compare", "--remote")
    assert [row["state"] for row in value["checkpoints"]] == ["verified", "verified"]
    assert "not in the bucket's sidecars" in value["notes"][0]
    code, out, _ = run(capsys, "plot", "50", "100", "--remote", "--terminal")
    assert code == 0
    assert "training loss over logged entry" in out


@pytest.mark.usefixtures("two_checkpoints")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["view", "51"], "There is no checkpoint '51'"),
        (["view", "../../etc"], "There is no checkpoint"),
        (["compare", "50"], "compare needs at least two checkpoints, 1 named"),
        (["compare", "--output-dir", "nowhere"], "nowhere does not exist."),
        (["view", "latest", "--output-dir", "nowhere"], "nowhere does not exist."),
        (["list", "--config", "tset"], "Known names"),
        (["list", "--run-name", "../x"], "run_name '../x'"),
        (["list", "--remote", "--set", "checkpoint_uri="], "no checkpoint_uri"),
        (["plot", "50", "--save", "a.docx"], "must end in one of"),
        (["plot", "50", "--save", "nowhere/a.png"], "cannot be written"),
        (["plot", "--run", "nowhere"], "--run nowhere: there is no such directory"),
        (["view", ""], "There is no checkpoint ''"),
        (["view", "\x1b[2J"], "There is no checkpoint '?[2J'"),
        (["list", "--last", "0"], "--last must be at least 1, got 0"),
        (["list", "--filter", "steps>1"], "the keys are step, epoch"),
        (["list", "--filter", "step>many"], "'many' is not a number"),
        (["list", "--filter", "time>today"], "'today' is not a time"),
        (["list", "--filter", "state>a"], "takes only = and !="),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("timestamp", "shown"),
    [
        ("2026-01-01T12:00:00.5+02:00", "2026-01-01 10:00:00"),
        ("2024-01-15T14:30:25.123456", "2024-01-15 14:30:25"),
        ("0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00"),
        (None, "-"),
    ],
)
def test_times_are_shown_in_utc(timestamp, shown):
    assert show_time(timestamp) == shown


def test_reading_changes_no_file(capsys, tmp_path, two_checkpoints):
    put_remote(tmp_path / "bucket", two_checkpoints[0])
    before = _snapshot(tmp_path)
    for argv in (["list"], ["view", "50"], ["compare"], ["list", "--remote"]):
        assert run(capsys, *argv)[0] == 0
    assert _snapshot(tmp_path) == before


def _snapshot(directory: Path):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


# list: filters, order, the terminal


@pytest.fixture
def five_checkpoints(tmp_path):
    directory = tmp_path / "checkpoints"
    losses = {10: 5.0, 20: 3.0, 30: None, 40: 2.5, 50: 4.0}
    for step, loss in losses.items():
        hour = 20 - step // 10
        validation = {"validation_loss": loss and loss + 1}
        make_checkpoint(
            directory,
            step,
            current_loss=loss,
            validation_metrics=validation,
            timestamp=f"2026-01-01T{hour}:00:00Z",
        )
    journal = Journal(directory / "uploads.jsonl")
    journal.record("checkpoint-epoch0-step10-files0", RUN_ID, UploadState.VERIFIED)
    return directory


@pytest.mark.usefixtures("five_checkpoints")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("", [10, 20, 30, 40, 50]),
        ("--reverse", [50, 40, 30, 20, 10]),
        ("--sort loss --reverse", [10, 50, 20, 40, 30]),
        ("--sort validation-loss", [40, 20, 50, 10, 30]),
        ("--sort time", [50, 40, 30, 20, 10]),
        ("--sort size --last 2", [40, 50]),
        ("--last 3", [30, 40, 50]),
        ("--filter step>=20 --filter loss<4", [20, 40]),
        ("--filter loss<4.5 --last 2 --sort loss", [40, 50]),
        ("--filter state!=verified", [20, 30, 40, 50]),
        ("--filter kept=latest", [50]),
        ("--filter size>1GiB", []),
        ("--filter time>=2026-01-01T18:00:00", [10, 20]),
    ],
)
def test_list_filters_sorts_and_takes_the_last(capsys, options, steps):
    rows = run_json(capsys, "list", *options.split())["checkpoints"]
    assert [row["step"] for row in rows] == steps


@pytest.mark.usefixtures("five_checkpoints")
def test_list_says_how_many_of_all_it_shows(capsys):
    assert "Found 2 of 5 checkpoints in checkpoints" in run(capsys, "list", "--filter", "loss<4")[1]
    assert "Found 0 of 5 checkpoints in checkpoints" in run(capsys, "list", "--filter", "loss<0")[1]


def test_list_tells_another_buckets_uploads_from_this_ones(capsys, two_checkpoints):
    journal = Journal(two_checkpoints[0].parent / "uploads.jsonl")
    manifest = crc32c_of_file(two_checkpoints[0] / "manifest.json")
    for path, bucket, state in (
        (two_checkpoints[0], "elsewhere", "not in this bucket"),
        (two_checkpoints[1], "bucket", "not in this bucket"),  # these are other files
        (two_checkpoints[0], "bucket", "verified"),
    ):
        details = {"bucket": str(Path(bucket).absolute()), "manifest_crc32c": manifest}
        journal.record(path.name, RUN_ID, UploadState.VERIFIED, **details)
        states = {row["name"]: row["state"] for row in run_json(capsys, "list")["checkpoints"]}
        assert states[path.name] == state


def test_terminal_gets_a_table_that_fits_it_and_cannot_be_steered(tmp_path, two_checkpoints):
    make_checkpoint(tmp_path / "checkpoints", 150, timestamp="\x1b]0;owned\x07")
    (tmp_path / "checkpoints" / "uploads.jsonl").unlink()
    wide = run_in_terminal(SCRIPT, "list", cwd=tmp_path, columns=200, NO_COLOR="1")
    for text in ("  tokens  ", "checkpoint-epoch0-step50-files0", "newest 3", "latest, best"):
        assert text in wide
    assert "?]0;owned?" in wide
    assert "\x1b]" not in wide
    assert "\x07" not in wide
    narrow = run_in_terminal(SCRIPT, "list", cwd=tmp_path, NO_COLOR="1")
    assert "Not shown in this width: tokens, size" in narrow
    assert find_misfits(narrow, wide, 80) == []


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Make this process believe that it writes to a terminal."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)


def test_values_that_the_output_cannot_encode_are_replaced(tmp_path):
    make_checkpoint(tmp_path / "checkpoints", 50, run_id="\u00e9", git_commit="\u4e2d\ud800")
    out = run_python(SCRIPT, "view", "50", "--all", cwd=tmp_path, PYTHONIOENCODING="ascii").stdout
    assert "Git Commit: ??" in out
    assert "Loss Trend: improving\n" in out  # without an arrow


@pytest.mark.usefixtures("two_checkpoints")
@pytest.mark.parametrize(
    ("name", "step"), [("latest", 100), ("best", 100), ("epoch0-step5", 50), ("step50", 50)]
)
def test_names_may_be_abbreviated(capsys, name, step):
    rows = run_json(capsys, "compare", name, name)["checkpoints"]
    assert [row["step"] for row in rows] == [step, step]


# view, compare


def put_weights(checkpoint, step, tensors):
    from safetensors.torch import save_file

    save_file(tensors, checkpoint / "model.safetensors")
    seal(checkpoint, step)


def test_compare_shows_the_drift_of_the_weights(capsys, two_checkpoints):
    import torch

    for path, step, scale in zip(two_checkpoints, (50, 100), (1.0, 2.0), strict=True):
        layers = {f"layers.{n}.w": torch.full((4,), scale, dtype=torch.bfloat16) for n in (2, 10)}
        put_weights(path, step, {**layers, "embed.weight": torch.ones(9)})
    (pair,) = run_json(capsys, "compare", "--weights")["weights"]
    assert list(pair["layers"]) == ["embed", "layers.2", "layers.10"]
    assert pair["layers"]["layers.2"]["norm"] == 4
    assert pair["layers"]["layers.2"]["change"] == 1
    assert pair["total"]["num_elements"] == 17
    _, out, _ = run(capsys, "compare", "--weights")
    assert "Weights, [1] to [2]:" in out
    assert ["layers.10", "4", "4", "1.000e+00", "1.00000000", "0", "0"] in [
        line.split() for line in out.splitlines()
    ]
    assert run_json(capsys, "compare")["weights"] is None


def test_weights_that_cannot_be_read_are_a_problem_of_that_pair(capsys, tmp_path, two_checkpoints):
    (two_checkpoints[1] / "model.safetensors").write_bytes(b"weightz" * 100)
    code, out, err = run(capsys, "compare", "--weights")
    assert (code, err) == (0, "")
    assert "[1] to [2]" in out
    assert "cannot be read" in out  # that of step 50 is no safetensors file
    put_remote(tmp_path / "bucket", two_checkpoints[0])
    code, _, err = run(capsys, "compare", "50", "50", "--weights", "--remote")
    assert code == 2
    assert "upload_manager.py download checkpoint-epoch0-step50-files0" in err


# plot


@pytest.mark.usefixtures("two_checkpoints", "terminal")
def test_plot_in_a_terminal_is_text_and_writes_no_file(capsys, tmp_path):
    before = _snapshot(tmp_path)
    _, out, _ = run(capsys, "plot")
    for text in ("checkpoint-epoch0-step100-files0", "training loss over step", "gradient norm"):
        assert text in out
    assert _snapshot(tmp_path) == before
    assert "training loss" not in run(capsys, "plot", "--save", "a.png")[1]
    assert (tmp_path / "a.png").exists()


def test_plot_draws_several_checkpoints_and_runs_in_one_picture(capsys, tmp_path, two_checkpoints):
    path = make_checkpoint(tmp_path / "other" / "$_$", 20)
    absurd = {
        "steps": [1, 1e15, 1e300],
        "loss_history": [1e308, -1e38, 1e38],
        "learning_rates": [5e-324, 0, 1],
        "grad_norms": [10**400, 1, 2],
    }
    (path / "training_metrics.json").write_text(json.dumps({**make_history(30), **absurd}))
    runs = ("--run", "checkpoints", "--run", "other/$_$")
    code, out, _ = run(capsys, "plot", "--terminal", "--save", "a.svg", *runs)
    assert code == 0
    assert "* checkpoints: checkpoint-epoch0-step100-files0" in out
    assert "o other/$_$: checkpoint-epoch0-step20-files0" in out
    assert "<svg" in (tmp_path / "a.svg").read_text()
    value = run_json(capsys, "plot", "50", "100")
    assert [curves["label"] for curves in value["curves"]] == [
        path.name for path in two_checkpoints
    ]
    put_remote(tmp_path / "one", two_checkpoints[0])
    put_remote(tmp_path / "two", two_checkpoints[1])
    value = run_json(capsys, "plot", "--remote", "--run", "one", "--run", "two")
    assert [len(curves["series"]["loss"]["values"]) for curves in value["curves"]] == [5, 10]


def test_plot_leaves_out_curves_that_do_not_fit_the_axis(capsys, two_checkpoints):
    (two_checkpoints[0] / "training_metrics.json").unlink()
    code, out, _ = run(capsys, "plot", "50", "100", "--terminal")
    assert code == 0
    assert "Note: checkpoint-epoch0-step50-files0 is left out: its steps are not known." in out
    assert "over step" in out


# Remote


def test_remote_reads_only_the_sidecars_it_shows(capsys, tmp_path, two_checkpoints, monkeypatch):
    for path in two_checkpoints:
        put_remote(tmp_path / "bucket", path)
    read = []
    original = DirectoryBucket.read_bytes
    monkeypatch.setattr(
        DirectoryBucket,
        "read_bytes",
        lambda self, name, *a: read.append(name) or original(self, name, *a),
    )
    assert run_json(capsys, "view", "50", "--remote")["is_best"] is None
    assert read == ["Checkpoints/checkpoint-epoch0-step50-files0.json"]
    assert run_json(capsys, "view", "best", "--remote")["is_best"] is True


def test_remote_names_what_is_damaged_foreign_or_unfinished(capsys, tmp_path, two_checkpoints):
    put_remote(tmp_path / "bucket", two_checkpoints[0])
    folder = tmp_path / "bucket" / "Checkpoints"
    (folder / "checkpoint-epoch0-step60-files0.json").write_text('{"manifest": ')
    (folder / "checkpoint-epoch0-step70-files0.tar.gz").write_bytes(b"archive")
    (folder / "\x1b[2J.json").write_text("{}")
    code, out, _ = run(capsys, "list", "--remote")
    assert code == 0
    assert "Found 2 checkpoints" in out
    assert "step60-files0.json: " in out
    assert "Note: checkpoint-epoch0-step70-files0 is not listed: it has no sidecar" in out
    assert "Upload: damaged in bucket" in out
    assert "\x1b" not in out


# Damage and hostility


HUGE = 10**400
# As many digits as Python reads and writes; a sum of two has one more.
ENDLESS_FILE = '{"size": %s, "crc32c": ""}' % ("9" * 4300)  # noqa: UP031
DEEP = "[" * 500 + "]" * 500


METADATA = [
    {
        "loss_history": f"[1.0, {HUGE}, 2e308, -2e308]",
        "learning_rates": '[1, "\\u001b[2J", {"a": [2]}]',
        "timestamp": '"9999-12-31T23:59:59-23:59"',
        "run_id": DEEP,
        "git_commit": '"\\u001b[31m\\u0007"',
        "spending": DEEP,
        "training_progress": f'{{"tokens_seen": {HUGE}, "samples_seen": 1e308}}',
        "system_info": '{"world_size": 0, "num_parameters": -1, "device": []}',
        "validation_metrics": f'{{"\\u001b[2J": {DEEP}, "validation_loss": "x"}}',
    },
    {
        "loss_history": "[1.0, 1.7e308, 1.7e308]",
        "timestamp": DEEP,
        "current_loss": f"{HUGE}",
        "spending": f'{{"seconds": {HUGE}, "dollars": -1, "starts": {HUGE}}}',
        "training_progress": '{"mfu": "\\u001b", "tokens_seen": "\\u001b[2J", "max_steps": 1e308}',
        "system_info": "7",
    },
    {
        "loss_history": DEEP,
        "extra": DEEP,
        "spending": '{"seconds": 1e308, "dollars": 1e308, "hourly_price": 9e9}',
        "training_progress": "[1]",
    },
]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("manifest.json", {"files": f'{{"model.safetensors": {{"size": {HUGE}, "crc32c": 1}}}}'}),
        ("manifest.json", {"files": f'{{"a": {ENDLESS_FILE}, "b": {ENDLESS_FILE}}}'}),
        ("manifest.json", {"branch": "-5"}),
        (
            "manifest.json",
            {"files": r'{"\u001b[2J": {"size": -1, "crc32c": "\u001b[2J"}}'},
        ),
        *(("metadata.json", values) for values in METADATA),
        ("training_config.json", {"learning_rate": DEEP, r"\u001b[2J": '"\\u001b[2J"'}),
        ("data_state.json", {"shards": f"[{DEEP}]"}),
        (
            "training_metrics.json",
            {
                "steps": f'[{HUGE}, "x", null, 1e308]',
                "tokens_per_second": f"[{', '.join(10 * ['1.7e308'])}]",
            },
        ),
    ],
)
def test_absurd_values_stop_no_command_and_steer_no_terminal(capsys, two_checkpoints, file, values):
    path = two_checkpoints[1] / file
    known = {**json.loads(path.read_text()), **{key: f"PLACE {key}" for key in values}}
    text = json.dumps(known)
    for key, value in values.items():
        text = text.replace(json.dumps(f"PLACE {key}"), value)
    path.write_text(text)
    for argv in (["list"], ["view", "100"], ["compare"], ["plot", "--terminal"], ["report"]):
        for options in ([], ["--json"]):
            code, out, err = run(capsys, *argv, *options)
            assert (code, err) == (0, "")
            assert "\x1b" not in out
            assert "\x07" not in out
            if options:
                json.loads(out, parse_constant=pytest.fail)


def test_a_directory_that_cannot_be_read_is_one_message(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run(capsys, "list", "--output-dir", "file")[0] == 0
    (tmp_path / "loop").symlink_to("loop")
    code, _, err = run(capsys, "list", "--output-dir", "loop")
    assert code == 2
    assert err.startswith("Error: loop cannot be read: ")


def test_a_checkpoint_that_vanishes_meanwhile_is_left_out(capsys, monkeypatch, two_checkpoints):
    names = find_checkpoints(two_checkpoints[0].parent)
    shutil.rmtree(two_checkpoints[0])
    monkeypatch.setattr(shelf, "find_checkpoints", lambda _: names)
    rows = run_json(capsys, "list")["checkpoints"]
    assert [row["step"] for row in rows] == [100]
    code, _, err = run(capsys, "view", "50")
    assert (code, "has just been deleted" in err) == (2, True)


SPENDING = {
    "starts": 2,
    "seconds": 7200.0,
    "dollars": 20.0,
    "unpriced_seconds": 3600.0,
    "lost_seconds": 720.0,
    "lost_dollars": 4.0,
    "hourly_price": 20.0,
}


def test_costs_are_shown_where_the_run_counted_them(capsys, tmp_path):
    directory = tmp_path / "checkpoints"
    make_checkpoint(directory, 25)
    make_checkpoint(directory, 50, spending=SPENDING)
    assert "Cost" not in run(capsys, "view", "25")[1]
    spent = (
        "Spent 2h00m, $20.00 in 2 attempts ($0.17 to the end; 1h00m without a price; "
        "12m00s, $4.00 lost to restarts)."
    )
    assert spent in run(capsys, "view", "50")[1]
    priced = run(capsys, "view", "50", "--hourly-price", "5")[1]
    assert "Spent 2h00m, $25.00 in 2 attempts ($244.14 per million tokens; " in priced
    older, newer = run_json(capsys, "list", "--hourly-price", "5")["checkpoints"]
    assert older["costs"] is None
    assert newer["costs"]["remaining_seconds"] == pytest.approx(50 * 2048 / 3400.5)
    assert "$20.00" in run(capsys, "compare")[1]
