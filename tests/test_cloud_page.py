"""docs/CLOUD.md: its tables are those of the formulas, its commands exist."""

from __future__ import annotations

import inspect
import re
import shlex
from types import ModuleType
from typing import Any

import pytest

import train
from configs.training_config import PROJECT_DIRECTORY
from scripts import plan_scaling, prepare_data, upload_manager
from tests.test_modal_app import modal_app
from utils.base.errors import UsageError
from utils.costs import cloud_tables
from utils.costs.scaling_tables import write_tables

__all__ = ["modal_app"]  # the fixture

PAGE = plan_scaling.CLOUD_DOCUMENT


def commands(*begin: str) -> list[list[str]]:
    """Return the words of the page's commands that begin so, in blocks and in sentences."""
    text = PAGE.read_text("utf-8")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    lines += [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(begin)]


def test_the_page_says_what_the_formulas_say() -> None:
    text = PAGE.read_text("utf-8")
    assert write_tables(text, cloud_tables.CLOUD_TABLES) == text, (
        "run: python scripts/plan_scaling.py --write"
    )
    with pytest.raises(UsageError, match="table prices"):
        write_tables("A page without tables.", cloud_tables.CLOUD_TABLES)


def test_a_gpus_price_is_that_of_one_such_gpu_and_not_of_a_namesake() -> None:
    assert cloud_tables.find_prices(("A10G", "modal/A10"), "modal") == [1.1016]
    assert cloud_tables.find_prices(("A10G", "modal/A10"), "lambda") == []  # its A10 is another one
    assert cloud_tables.find_prices(("T4",), "aws") == [0.526]
    assert cloud_tables.find_prices(("H100", "H100 SXM"), "gcp") == [10.9791]


def test_a_run_of_the_page_costs_time_by_price(monkeypatch: pytest.MonkeyPatch) -> None:
    run = cloud_tables.RentedRun("refocused-1.2b", "one", 4, 2048, 1000)
    assert run.tokens == 1000 * 4 * 2048
    gpu, names = cloud_tables.GPUS["H100"]
    plan = cloud_tables.best_plan(
        cloud_tables.TrainingJob(cloud_tables.shape_of_preset(run.model), gpu, 1, "ddp", 4, 2048)
    )
    assert plan is not None
    hours = run.tokens / plan.tokens_per_second / 3600
    monkeypatch.setattr(cloud_tables, "find_prices", lambda *_: [2 / hours, 30 / hours])
    assert cloud_tables._cell(run, gpu, names).endswith(", $2.0-30.0")
    assert cloud_tables._cell(run, cloud_tables.A10G, names) == "does not fit"


def test_every_modal_command_of_the_page_has_its_options(modal_app: ModuleType) -> None:
    found = commands("modal run cloud/", "modal run --detach cloud/")
    assert len(found) >= 8
    for words in found:
        name = next(word for word in words if "::" in word).partition("::")[2]
        given = words[words.index(next(word for word in words if "::" in word)) + 1 :]
        parameters: Any = inspect.signature(modal_app.app.entrypoints[name]).parameters
        options = [word[2:].replace("-", "_") for word in given if word.startswith("--")]
        assert [option for option in options if option not in parameters] == [], words
        needed = {key for key, one in parameters.items() if one.default is one.empty}
        assert not given or needed <= set(options), words


def test_every_command_of_the_page_is_one_of_the_project() -> None:
    for words in commands("python scripts/upload_manager.py"):
        upload_manager.parse_arguments(words[2:])
    for words in commands("python train.py"):
        train.load_config(train.parse_arguments(words[2:]))
    for words in commands("python scripts/prepare_data.py"):
        prepare_data.build_parser().parse_args(words[2:])
    (words,) = commands("bash run.sh")
    train.load_config(train.parse_arguments(["--config", *words[2:]]))
    for name in re.findall(r"\b((?:cloud|docs|scripts)/[\w.]+)", PAGE.read_text("utf-8")):
        assert (PROJECT_DIRECTORY / name).exists(), name


def test_the_links_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text("utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (PAGE.parent / target).exists(), target
