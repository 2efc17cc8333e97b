"""The page of a run: what is on it, that foreign text stays text, and that it stays small."""

from __future__ import annotations

import os
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs.training_config import TrainingConfig
from scripts.checkpoint_viewer import main
from tests.sample_checkpoints import RUN_ID, make_checkpoint, put_remote
from tests.sample_logs import write_start, write_step
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import RunPaths
from utils.tools.evaluation.log import Evaluation, append_evaluation
from utils.tools.report.charts import thin_series
from utils.tracking.metrics_log import append_metrics
from utils.tracking.plots import Series

MAX_BYTES = 1_000_000 / 2  # with room for what the run of this test lacks
NOISY = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")
ATTACK = """</td><script>alert("1")</script><img src=//evil.example/x onerror='x'>&amp;"""
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page as a browser understands it: text, tags, and what it would ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asked_for: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.asked_for.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def make_run(attack: str = "") -> RunPaths:
    """Leave the files of a run of two attempts in the current directory."""
    paths = RunPaths.of(TrainingConfig(run_name="deeper"))
    configs = ({"eval_steps": 20}, {"eval_steps": 25, "model": f"gpt2{attack}"})
    write_start(paths.metrics, hostname=f"vm-1{attack}", hourly_price=2.0, config=configs[0])
    for step in range(10, 60, 10):
        write_step(paths.metrics, step, loss=8 - step / 25)
    append_metrics(paths.metrics, {"step": 50, "validation_loss": 6.25})
    append_metrics(
        paths.metrics,
        {"event": "bad_step", "step": 55, "kind": f"spike{attack}", "loss": 99.5, "policy": "skip"},
    )
    write_start(paths.metrics, "resume", 50, hostname="vm-2", config=configs[1])
    append_metrics(paths.metrics, {"event": "end", "step": 100, "outcome": "done"})
    for step, text in ((50, "was a b"), (100, "is a cat")):
        append_metrics(
            paths.samples, {"step": step, "prompt": f"This{attack}", "text": text + attack}
        )
    made = [
        make_checkpoint(
            paths.checkpoints,
            step,
            config={**config, "checkpoint_uri": "bucket"},
            git_commit=f"abc{attack}",
        )
        for step, config in zip((50, 100), configs, strict=True)
    ]
    journal = Journal(paths.journal)
    journal.record("checkpoint-epoch0-step20-files0", RUN_ID, UploadState.VERIFIED)
    journal.record(made[1].name, RUN_ID, UploadState.FAILED, error=f"403{attack}")
    what = {"sequence_length": 512}
    found = Evaluation(f"step 100{attack}", f"hellaswag{attack}", {f"acc{attack}": 0.25}, what)
    append_evaluation(paths.evaluations, found)
    return paths


def report(*words: str) -> Page:
    assert main(["report", "--run-name", "deeper", *words]) == 0
    return Page(Path("run.html"))


@pytest.fixture(autouse=True)
def _work_in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_page_shows_all_of_a_run_and_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_run()
    page = report()
    assert capsys.readouterr().out.startswith("Report saved to run.html (")
    for words in (
        "Run deeper",
        "State finished: all steps are done",
        "Steps 100 of 100",
        "Best validation loss 5.134204 at step 100",
        "training loss validation loss",
        "Learning rate",
        "Throughput (tokens/s)",
        "Gradient norm",
        "Changed at a resume at step key before after 50 eval_steps 20 25 50 model null gpt2",
        "On this machine: checkpoints/deeper",
        "Bucket: bucket/deeper",
        "checkpoint-epoch0-step20-files0 20 7.200000 - - - - no verified",
        "checkpoint-epoch0-step100-files0 100 5.034204",
        "yes failed latest latest, best",
        "hellaswag (512 tokens at once) model step acc step 100 - 0.2500",
        "Step 50: This was a b Step 100: This is a cat",
        "55 spike 9",
        "Attempts began (UTC) machine from step to step ended",
        "vm-1 0 - no end was recorded",
        "vm-2 50 100 done",
    ):
        assert words in page.text
    assert page.tags.count("svg") == 4
    assert {where for where in page.asked_for if not where.startswith("#")} == {"data:,"}
    assert "script" not in page.tags

    put_remote(Path("bucket/deeper"), paths.checkpoints / "checkpoint-epoch0-step50-files0")
    assert "checkpoint-epoch0-step20-files0" not in report("--remote").text


def test_foreign_text_is_text_and_nothing_else() -> None:
    make_run()
    clean = report()
    for path in (Path("checkpoints"), Path("logs")):
        path.rename(f"{path}.clean")
    make_run(ATTACK)
    page = report()
    assert page.tags == clean.tags
    assert page.asked_for == clean.asked_for
    assert page.text.count('<script>alert("1")</script>') >= 8


def test_a_run_of_100000_steps_makes_a_small_page() -> None:
    paths = make_run()
    noise = random.Random(1)
    form = '{"step": %d, ' + ", ".join(f'"{key}": %.6f' for key in NOISY) + "}\n"
    with paths.metrics.open("a") as file:
        for step in range(101, 100_001):
            file.write(form % (step, *(noise.random() for _ in NOISY)))
        file.writelines(f'{{"event": "bad_step", "step": {step}}}\n' for step in range(1000))
    text = "<" * 5000
    with paths.samples.open("a") as file:
        file.writelines(
            f'{{"step": {step}, "prompt": "", "text": "{text}"}}\n' for step in range(1000)
        )
    for length in range(100):
        what = {"sequence_length": length}
        found = Evaluation("a" * 50, "validation", {"loss": 1.0}, what)
        append_evaluation(paths.evaluations, found)
    page = report()
    assert "The last 200 of 1,001." in page.text
    assert "of 1,000 evaluations" in page.text
    assert Path("run.html").stat().st_size < MAX_BYTES


def test_what_is_missing_is_said_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "There is no run to show: nothing is logged in logs" in capsys.readouterr().err
    write_start(Path("logs/deeper/metrics.jsonl"))
    (Path("logs/deeper/samples.jsonl")).mkdir()
    page = report("--output-dir", "elsewhere")
    for words in (
        "Nothing was logged of: Loss, Learning rate, Throughput (tokens/s), Gradient norm.",
        "It is not known: no attempt and no checkpoint has it.",
        "There is none.",
        "evaluate.py has measured nothing of this run yet.",
        "The run wrote none.",
        "samples.jsonl cannot be read",
    ):
        assert words in page.text
    assert main(["report", "--output", "no/such/folder/run.html", "--run-name", "deeper"]) == 2
    assert "no/such/folder/run.html cannot be written" in capsys.readouterr().err


def test_files_that_are_none_are_said_and_the_rest_is_shown() -> None:
    paths = make_run()
    for path in (paths.metrics, paths.samples, paths.evaluations, paths.journal):
        path.unlink()
        os.mkfifo(path)
    text = report().text
    for path in (paths.metrics, paths.samples):
        assert f"{path} cannot be read" in text
    assert "evaluations.jsonl cannot be read" in text
    assert "the journal cannot be read" in text
    assert "checkpoint-epoch0-step100-files0 100 5.034204" in text
    assert "at step key before after 100 eval_steps 20 25" in text  # of the checkpoints


def test_absurd_numbers_are_left_out() -> None:
    paths = make_run()
    with paths.metrics.open("a") as file:
        for step, loss in ((101, 1e308), (2**63 - 1, 1.0), (102, -1e308), (103, 1e-320)):
            file.write(f'{{"step": {step}, "loss": {loss}, "grad_norm": 1e999}}\n')
    assert report().tags.count("svg") == 4


def test_a_thinned_curve_keeps_its_ends_and_its_spikes() -> None:
    values = [1.0] * 100_000
    values[50_123], values[70_456], values[7] = 9.0, -9.0, float("nan")
    thin = thin_series(Series(range(100_000), values), 100)
    assert len(thin.steps) <= 100
    assert list(thin.steps) == sorted(thin.steps)
    points = dict(zip(thin.steps, thin.values, strict=True))
    assert (points[50_123], points[70_456]) == (9.0, -9.0)
    assert 0 in points
