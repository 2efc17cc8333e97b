"""A killed and resumed run is proven to be the straight one, and a run that is not is found out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import prove_resume
from tests.campaigns.fork_server import ForkServer
from tests.conftest import TINY
from tests.sample_checkpoints import seal_file
from utils.base.errors import CheckpointError
from utils.checkpoints.layout import find_checkpoints, read_json, write_json
from utils.tools.proofs.run_comparison import (
    STRAIGHT,
    compare_checkpoints,
    compare_logs,
    values_by_step,
)
from utils.tools.proofs.started_runs import CommandLauncher, Launcher, Running, read_records

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks train.py"),
    pytest.mark.usefixtures("logging_as_before"),
]

SETTINGS = [setting for setting in TINY if not setting.startswith("checkpoint_uri=")]


def prove(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, data: Path, work: Path, *words: str
) -> int:
    """Call the command with a very small model and another way to start train.py."""
    monkeypatch.setattr(prove_resume, "CommandLauncher", lambda processes: launcher)
    command = ["--kills", "2", "--workdir", str(work), "--json", *words]
    for setting in (*SETTINGS, f"data_uri={data}"):
        command += ["--set", setting]
    return prove_resume.main(command)


class Late:
    """Starts train.py; the first start of the interrupted run is over before anyone looks."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.starts = 0

    def start(self, words: Sequence[str], output: Path) -> Running:
        running = self._launcher.start(words, output)
        self.starts += 1
        if self.starts == 2:
            assert running.wait() == 0
        return running


class Altered:
    """Starts train.py; the interrupted run gets other settings, all of it or what resumes."""

    def __init__(self, launcher: Launcher, setting: str, only_without: Path | None = None) -> None:
        self._launcher, self._setting, self._only_without = launcher, setting, only_without

    def start(self, words: Sequence[str], output: Path) -> Running:
        is_meant = self._only_without is None or (
            "--resume" in words and not self._only_without.is_dir()
        )
        if is_meant and not any(word.endswith(STRAIGHT) for word in words):
            words = [*words, "--set", self._setting]
        return self._launcher.start(words, output)


@pytest.fixture(scope="module")
def proven(
    server: ForkServer, sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object], int]:
    """The folder, the report and the number of starts of a proof that holds."""
    work = tmp_path_factory.mktemp("proof") / "work"
    launcher = Late(server)
    report = work.with_name("report.json")
    with pytest.MonkeyPatch.context() as patch, report.open("w", encoding="utf-8") as file:
        patch.setattr(sys, "stdout", file)
        code = prove(patch, launcher, sample_data, work, "--steps", "8", "--keep")
    value = read_json(report)
    assert code == 0, value
    return work, value, launcher.starts


@pytest.mark.slow
def test_two_kills_one_resume_from_the_bucket_and_no_difference(
    proven: tuple[Path, dict[str, object], int],
) -> None:
    _, report, launched = proven
    assert report["holds"] is True
    assert report["problems"] == []
    starts = report["starts"]
    assert isinstance(starts, list)
    ends = [start["ended"] for start in starts]
    assert [end.split(" ")[0] for end in ends] == ["killed", "killed", "done"]
    assert starts[2]["source"] == "bucket"
    assert starts[2]["begin"] > 0
    assert starts[2]["resumed"].startswith("checkpoint-epoch0-step")
    # The straight run, one start that was over before its kill, and these three.
    assert launched == 5
    comparisons = report["comparisons"]
    assert isinstance(comparisons, list)
    compared = {comparison["what"]: comparison["extent"] for comparison in comparisons}
    assert compared["loss"] == "8 steps"
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        assert name in compared
    assert compared["batches (crc32c)"] == "8 steps"


@pytest.mark.slow
def test_one_changed_number_is_found_wherever_it_is(
    proven: tuple[Path, dict[str, object], int], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    work, _, _ = proven
    folder = work / "checkpoints" / STRAIGHT
    straight = folder / str(find_checkpoints(folder)[-1])
    other = tmp_path / straight.name
    shutil.copytree(straight, other)
    assert not any(c.differences for c in compare_checkpoints(straight, other))

    weights = load_file(other / "model.safetensors")
    name = "gpt_neox.final_layer_norm.bias"
    weights[name][3] = torch.nextafter(weights[name][3], torch.tensor(1.0))
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged"):
        compare_checkpoints(straight, other)
    seal_file(other, "model.safetensors")
    optimizer = torch.load(other / "optimizer.bin")
    optimizer["state"][0]["exp_avg"][0, 0] *= -1.0
    torch.save(optimizer, other / "optimizer.bin")
    seal_file(other, "optimizer.bin")
    position = read_json(other / "data_state.json")
    write_json(other / "data_state.json", {**position, "seed": position["seed"] + 1})
    seal_file(other, "data_state.json")
    found = {c.what: c.differences for c in compare_checkpoints(straight, other) if c.differences}
    assert found == {
        "model.safetensors": (f"/{name}",),
        "optimizer.bin": ("/state/0/exp_avg",),
        "data_state.json": ("/seed",),
    }


@pytest.mark.slow
def test_one_changed_loss_or_missing_step_is_found(
    proven: tuple[Path, dict[str, object], int], tmp_path: Path
) -> None:
    work, _, _ = proven
    straight = work / "logs" / STRAIGHT
    for name, line_of_change in (("changed", True), ("missing", False)):
        other = tmp_path / name
        shutil.copytree(straight, other)
        lines = []
        for line in (straight / "metrics.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            if record["step"] == 7 and "loss" in record:
                record["loss"] += 1e-15
                lines += [json.dumps(record)] if line_of_change else []
            else:
                lines.append(line)
        (other / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        differing = {c.what: c.differences for c in compare_logs(straight, other, 8)}
        assert len(differing["loss"]) == 1
        assert differing["loss"][0].startswith("step 7")
        assert bool(differing["curve"]) is not line_of_change


def test_a_torn_line_hides_no_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    lines = [
        '{"step": 1, "crc32c": "a"}',
        '{"step": 2, "cr',  # torn by a crash
        '{"step": 2, "crc32c": "b"}',
        '{"step": 3, "crc32c": "c"}',
        '{"step": 3, "crc32c": "d"}',
        '{"step": 4, "crc',
    ]
    path.write_text("\n".join(lines), "utf-8")
    assert values_by_step(path, "crc32c") == {1: {'"a"'}, 2: {'"b"'}, 3: {'"c"', '"d"'}}
    records, offset = read_records(path)
    assert [record["step"] for record in records] == [1, 2, 3, 3]
    assert path.read_bytes()[offset:] == lines[-1].encode()


@pytest.mark.slow
def test_a_run_with_another_seed_is_found_out_and_leaves_nothing(
    server: ForkServer,
    sample_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launcher = Altered(server, "seed=7")
    work = tmp_path / "work"
    words = ["--steps", "8", "--set", "background_save=false"]
    assert prove(monkeypatch, launcher, sample_data, work, *words) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] is False
    differing = {c["what"] for c in report["comparisons"] if c["differences"]}
    assert {"loss", "model.safetensors", "optimizer.bin", "data_state.json"} <= differing
    assert "learning_rate" not in differing
    assert report["starts"][2]["source"] == "bucket"
    assert not work.exists()


@pytest.mark.slow
def test_a_start_that_does_not_look_into_the_bucket_is_found_out(
    server: ForkServer,
    sample_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    launcher = Altered(server, "checkpoint_uri=", only_without=work / "checkpoints/interrupted")
    assert (
        prove(monkeypatch, launcher, sample_data, work, "--steps", "8", "--set", "save_steps=1")
        == 1
    )
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "began at step 0, although step" in problem
    assert "is verified in the bucket" in problem


@pytest.mark.slow
def test_two_ranks_are_started_as_a_user_starts_them(tmp_path: Path) -> None:
    output = tmp_path / "output"
    running = CommandLauncher(2).start(["--help"], output)
    assert running.wait() == 0
    assert output.read_text().count("usage: train.py") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kills", "1"), "--kills must be at least 2, got 1"),
        (("--steps", "2"), "--steps must be at least 4, got 2"),
        (("--set", "max_steps=5"), "max_steps: the proof decides this itself"),
        (("--set", "checkpoint_uri=gs://a"), "checkpoint_uri: the proof decides"),
        (("--workdir", "full"), "is not empty"),
        (("--set", "max_step=5"), "Did you mean max_steps?"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    assert prove_resume.main(list(words)) == 2
    assert message in capsys.readouterr().err
