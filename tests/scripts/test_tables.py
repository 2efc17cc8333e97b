"""Every table of every command, in terminals of 60, 80 and 100 columns and in a pipe."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.training_config import TrainingConfig
from scripts import (
    checkpoint_viewer,
    evaluate,
    monitor_training,
    plan_scaling,
    prove_resume,
    upload_manager,
)
from tests.sample_checkpoints import make_checkpoint, put_remote
from tests.screens import WIDTHS, find_misfits, read_screen
from tests.scripts.test_checkpoint_viewer import SPENDING
from tests.test_debug_gpu import FACTS
from tests.utils.tools.monitor.test_view import FULL
from utils.base.tables import print_table
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import CheckpointName, read_manifest
from utils.remote.verification import CheckpointReport, Orphan
from utils.start.checks import Check, print_checks
from utils.tools.diagnosis.findings import find_causes
from utils.tools.diagnosis.fit import find_forecasts
from utils.tools.diagnosis.text import print_page
from utils.tools.evaluation.log import Evaluation, append_evaluation, weights_id
from utils.tools.proofs.proof import Attempt, Report
from utils.tools.proofs.run_comparison import Comparison
from utils.tools.uploads import text as upload_text
from utils.tools.viewer import text as viewer_text

Show = Callable[[], object]
RUN = "a-run-with-a-long-name-of-its-own"
URI = f"gs://a-bucket-of-a-large-project/pretraining/{RUN}"
NAMES = [f"checkpoint-epoch12-step{step}-files12345" for step in (98_000, 99_000, 100_000)]
ERROR = (
    f"403 Forbidden: the account trainer@a-large-project.example may not write {URI}/Checkpoints"
)
GO_ON = f"/mnt/disks/large/bin/python train.py --config mine --set run_name={RUN} --resume latest"
UPLOADS = {
    "directory": f"/mnt/disks/large/{RUN}/checkpoints",
    "bucket": URI,
    "bucket_problem": ERROR,
    "problems": [f"/mnt/disks/large/{RUN}/uploads.jsonl cannot be read: Permission denied"],
    "checkpoints": [
        {
            "checkpoint": name,
            "step": 100_000,
            "unpacked": "15.8 GiB",
            "archive": "14.9 GiB",
            "archive_bytes": 16 * 10**9,
            "local": "yes",
            "bucket": "unknown",
            "state": "not in this bucket",
            "progress": "43%, 52.1 MiB/s, 1m20s left, no news for 3m20s",
            "kept": "goes: not among the newest 3, nor a multiple of 5000",
            "note": "latest, best, damaged",
            "problem": ERROR,
            "action": "delete",
            "reason": "not among the newest 3, nor a multiple of 5000",
        }
        for name in NAMES
    ],
    "queue": [
        {
            "place": place,
            "checkpoint": name,
            "state": "uploading",
            "attempts": 12,
            "next try": "at the next run, or with the command retry",
        }
        for place, name in enumerate(NAMES, 1)
    ],
    "errors": [
        {"time": "2026-01-01T12:30:25+00:00", "checkpoint": name, "attempts": 5, "error": ERROR}
        for name in NAMES
    ],
    "notes": [f"{URI} keeps deleted objects for 7 days (soft delete): they cost as before"],
}
REPORTS = [
    CheckpointReport(CheckpointName(100_000, 12, 12_345), right=[f"{URI} has it"], wrong=[ERROR])
]
CHECKS = [
    Check("vocabulary", "ok", "50,304 in the model, 50,257 in the data"),
    Check("data", "ok", f"1,234 training shards with 123,456,789,012 tokens in {URI}/data"),
    Check("upload", "fail", f"{ERROR} Ask for the right to write {URI}."),
]
EVALUATIONS = [
    Evaluation(
        f"/mnt/disks/large/{RUN}/{name}",
        "validation",
        {
            "loss": 2.8451,
            "perplexity": 17.2,
            "bits_per_byte": 0.91,
            "acc_norm": 0.512,
            "acc_norm_stderr": 0.011,
            "tokens": 123_456_789,
            "tokens_per_second": 412_345.0,
        },
        {"sequence_length": 2048, "stride": 256, "max_tokens": 10**9},
        {"data": f"{URI}/data"},
        step=100_000,
    )
    for name in NAMES
]
PROOF = Report(
    seed=1,
    steps=100_000,
    starts=[
        Attempt(1, "nothing", "", 0, 33_333, "killed in a save at step 33,333", 12_345.0),
        Attempt(2, "bucket", NAMES[0], 33_000, 66_666, "killed while its upload ran", 12_345.0),
    ],
    comparisons=[
        Comparison("losses and learning rates of all steps", "100,000 steps of 100,000"),
        Comparison("optimizer", "12,345,678 values", (f"{NAMES[0]}: state.exp_avg differs",)),
    ],
    problems=[f"/tmp/{RUN}/checkpoints holds no checkpoint that can be compared"],
)


@pytest.fixture
def shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Show]:
    """Every command's tables, of large runs with long names."""
    monkeypatch.chdir(tmp_path)
    folder = f"{RUN}/checkpoints"
    for step in (98_000, 99_000, 100_000):
        last = make_checkpoint(tmp_path / folder, step, spending=SPENDING)
    journal = Journal(tmp_path / folder / "uploads.jsonl")
    journal.record(last.name, "20260101-0a1b2c3d", UploadState.FAILED, error=ERROR)
    put_remote(tmp_path / "bucket", last)
    append_evaluation(
        tmp_path / "logs" / "evaluations.jsonl",
        replace(EVALUATIONS[0], weights=weights_id(read_manifest(last))),
    )

    def view(*words: str) -> Show:
        return lambda: checkpoint_viewer.main([*words, "--output-dir", folder])

    session = evaluate.Session(Namespace(plot=None, json=False), TrainingConfig())
    session.evaluations = EVALUATIONS
    drift = dict.fromkeys(("num_elements", "norm", "change", "cosine", "older_nan", "nan"), 1e9)
    pair = {"layers": {"gpt_neox.final_layer_norm": drift}, "total": drift}
    return {
        "list": view("list"),
        "list --remote": view("list", "--remote"),
        "view": view("view", "latest"),
        "view --all": view("view", "latest", "--all"),
        "compare": view("compare", "98000", "99000", "100000"),
        "compare --weights": lambda: print_table(
            "Weights", viewer_text.drift_rows(pair), viewer_text.DRIFT_COLUMNS
        ),
        "upload status": lambda: upload_text.print_status(UPLOADS),
        "upload list": lambda: upload_manager.main(["list", "--set", f"output_dir={folder}"]),
        "verify": lambda: upload_text.print_reports(REPORTS, [Orphan(f"{URI}/a.gz", ERROR)]),
        "prune": lambda: upload_text.print_plan(URI, UPLOADS, 3),
        "monitor": lambda: monitor_training.print_view(replace(FULL, go_on=GO_ON)),
        "preflight": lambda: print_checks(CHECKS),
        "debug_gpu": lambda: print_page(FACTS, find_forecasts(FACTS), [*find_causes(FACTS)]),
        "plan_scaling": lambda: plan_scaling.main(["--gpus", "8", "512", "--price", "3.5"]),
        "evaluate": session.show,
        "prove_resume": lambda: prove_resume.print_report(PROOF),
    }


def test_tables_of_all_commands_fit_the_terminal_and_break_no_word(
    shows: dict[str, Show],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logging_as_before: None,
) -> None:
    for name, show in shows.items():
        piped = read_screen(show, None, monkeypatch, capsys)
        assert not [line for line in piped.splitlines() if line.endswith(" ")], name
        wide = read_screen(show, 2000, monkeypatch, capsys)
        for columns in WIDTHS:
            narrow = read_screen(show, columns, monkeypatch, capsys)
            assert narrow, name
            assert find_misfits(narrow, wide, columns) == [], f"{name} at {columns}:\n{narrow}"


def test_a_checkpoint_is_shown_on_one_screen(
    shows: dict[str, Show], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = read_screen(shows["view"], 80, monkeypatch, capsys)
    for part in (
        "State: failed",
        ERROR[:40],
        "Spent",
        "validation acc_norm 0.5120",
        "validation_loss: 0.1",
    ):
        assert part in brief
    assert 24 <= len(brief.splitlines()) <= 40
    assert len(read_screen(shows["view --all"], 80, monkeypatch, capsys).splitlines()) > 40


@pytest.mark.usefixtures("shows", "logging_as_before")
def test_the_only_checkpoint_has_its_whole_name_and_a_long_problem_costs_no_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(Path("one"), 50)
    name, alone = "checkpoint-epoch0-step50-files0", ["--set", "output_dir=one"]
    for words in (["list"], ["status"]):
        text = read_screen(
            lambda w=words: upload_manager.main([*w, *alone]), 60, monkeypatch, capsys
        )
        assert f"  {name}  " in text
    text = read_screen(lambda: checkpoint_viewer.main(["list", *alone]), 60, monkeypatch, capsys)
    assert f"  {name}  " in text

    damaged = {**UPLOADS["checkpoints"][0], "progress": "", "state": "failed"}
    result = {**UPLOADS, "checkpoints": [damaged]}
    text = read_screen(lambda: upload_text.print_status(result), 80, monkeypatch, capsys)
    header = next(line for line in text.splitlines() if line.startswith("  checkpoint"))
    assert header.split() == ["checkpoint", "unpacked", "local", "state", "note"]
    assert f"\n{NAMES[0]}: 403 Forbidden" in text
