"""Pictures say what they show: a title, short legends, a mark where a line has one point."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from utils.tracking.plots import Curves, Panel, Series, draw_panels, draw_picture, shorten_labels

LINE = Series([10, 20, 30], [3.0, 2.0, 1.0])
POINT = Series([20], [2.5])


def drawing(path: Path) -> tuple[list[str], int]:
    """Return (the texts of an SVG in their order, how many marks it has)."""
    text = path.read_text("utf-8")
    shown = re.findall(r"<!-- (.*?) -->", text)
    # A line's marks refer to a shape of its own with curves; ticks are straight.
    shapes = re.findall(r'<path id="(m\w+)" d="([^"]*)"', text)
    marks = [name for name, path_text in shapes if "C" in path_text]
    return shown, sum(text.count(f'xlink:href="#{name}"') for name in marks)


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (
            ["checkpoint-epoch0-step50-files0", "checkpoint-epoch0-step100-files0"],
            ["step50", "step100"],
        ),
        (["runs/a/out: checkpoint-step9", "runs/b/out: checkpoint-step9"], ["a", "b"]),
        (["a: checkpoint-step1", "other/b: checkpoint-step2"], ["a step1", "other b step2"]),
        (["a-b", "a"], ["a-b", "a"]),
        (["a-b-c", "b-a-d-c"], ["a-b-c", "b-a-d-c"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_labels_are_what_tells_them_apart(labels: list[str], short: list[str]) -> None:
    assert shorten_labels(labels) == short


def test_several_checkpoints_have_a_title_and_one_legend_each(tmp_path: Path) -> None:
    series = {"loss": LINE, "validation_loss": POINT, "grad_norm": LINE}
    every = [Curves(f"checkpoint-epoch0-step{step}-files0", series) for step in (50, 100)]
    shown, marks = drawing(draw_picture(every, tmp_path / "a.svg"))
    assert [text for text in shown if "step" in text] == ["step50", "step100", "step"]
    assert shown.count("validation") == 1
    assert shown[-1] == "Curves of 2 checkpoints"
    assert marks == 2 + 1  # the two evaluations, and the legend's


def test_a_line_of_one_point_is_seen_and_its_steps_are_whole(tmp_path: Path) -> None:
    series = {"loss": POINT, "learning_rate": POINT}
    shown, marks = drawing(draw_picture([Curves("only", series)], tmp_path / "a.svg"))
    assert marks == 2 + 1  # the legend of the loss
    assert {"only", "training loss", "20"} <= set(shown)
    assert "20.5" not in shown


def test_panels_say_what_is_in_them(tmp_path: Path) -> None:
    panels = [Panel(LINE, "loss", "of $_data"), Panel(POINT, "acc")]
    shown, marks = drawing(draw_panels(panels, "All of run 1", tmp_path / "a.svg"))
    assert {"loss", "of $_data", "acc", "All of run 1", "step"} <= {
        text.replace(r"\$", "$") for text in shown
    }
    assert marks == 4
