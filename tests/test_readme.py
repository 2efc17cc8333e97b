"""The pages say what is true: keys, presets, links, files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from configs.config_files import PROJECT_DIRECTORY
from configs.model_presets import PRESETS
from configs.training_config import TrainingConfig, get_training_config
from tests.test_architecture import UTILS, listed_rooms

README = PROJECT_DIRECTORY / "README.md"
DOCS = PROJECT_DIRECTORY / "docs"
PAGES = sorted([*PROJECT_DIRECTORY.glob("*.md"), *PROJECT_DIRECTORY.glob("*/*.md")])
GUIDES = [README, *sorted(DOCS.glob("*.md"))]  # the others speak of earlier versions too
TO_BE_WRITTEN = {"configs/mine.json"}


def name_of(page: Path) -> str:
    return page.relative_to(PROJECT_DIRECTORY).as_posix()


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the table rows that begin with a quoted name."""
    return [
        re.split(r" \| ", row.strip("| ")) for row in text.splitlines() if row.startswith("| `")
    ]


def without_first_cells(text: str) -> str:
    """Return a text without the first column of its tables: in MIGRATION.md, what is elsewhere."""
    return re.sub(r"^\| .*? \| ", "", text, flags=re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the titles of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2200


def test_the_first_two_commands_of_the_readme_set_themselves_up() -> None:
    block = README.read_text("utf-8").split("```bash\n", 1)[1].split("```", 1)[0].splitlines()
    assert [line.split("#")[0].strip() for line in block] == ["bash run.sh test", "make check"]


def test_the_configuration_page_has_every_key_with_its_default_and_no_other() -> None:
    rows = rows_of((DOCS / "CONFIGURATION.md").read_text("utf-8"))
    written = {row[0].strip("`"): json.loads(row[1].strip("`")) for row in rows}
    assert len(written) == len(rows)
    assert written == dataclasses.asdict(TrainingConfig())


def test_the_readme_explains_keys_that_exist() -> None:
    table = README.read_text("utf-8").split("| key | what it is |", 1)[1].split("\n\n", 1)[0]
    keys = {row[0].strip("`") for row in rows_of(table)}
    assert len(keys) == 10
    assert keys <= {field.name for field in dataclasses.fields(TrainingConfig)}


def test_the_models_page_has_every_preset_with_its_size() -> None:
    text = (DOCS / "MODELS.md").read_text("utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in text] == []
    sizes = {row[0].strip("`"): row[-1] for row in rows_of(text) if row[-1][0].isdigit()}
    assert len(sizes) >= 11
    for name, size in sizes.items():
        assert size.split(" ")[0] == f"{PRESETS[name].parameters:,}"


@pytest.mark.parametrize("page", [README, DOCS / "CONFIGURATION.md"], ids=lambda page: page.stem)
def test_an_example_of_a_configuration_is_one(page: Path, tmp_path: Path) -> None:
    block = page.read_text("utf-8").split("```json\n", 1)[1].split("```", 1)[0]
    (tmp_path / "mine.json").write_text(block)
    assert get_training_config(str(tmp_path / "mine.json")).run_name == "mine"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("https:"):
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors_of(found), target


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = without_first_cells(page.read_text("utf-8"))
    files = set(re.findall(r"\b((?:cloud|configs|docs|scripts|tests)/[\w./-]+\.\w+)", text))
    gone = {name for name in files if not (PROJECT_DIRECTORY / name).exists()}
    assert {name for name in gone if "NAME" not in name} <= TO_BE_WRITTEN


def test_the_architecture_page_has_every_room_in_the_order_of_the_list() -> None:
    text = (PROJECT_DIRECTORY / "ARCHITECTURE.md").read_text("utf-8")
    table = text.split("| folder |", 1)[1].split("\n\n", 1)[0]
    named = re.findall(
        r"`([a-z_]+)(?:/|\.py)`", "\n".join(r.split("|")[1] for r in table.splitlines())
    )
    rooms = [room.removeprefix("utils.") for room in listed_rooms()]
    assert named == rooms[::-1]


def test_the_architecture_page_names_no_file_that_is_not_there() -> None:
    text = (PROJECT_DIRECTORY / "ARCHITECTURE.md").read_text("utf-8")
    named = re.findall(r"`([a-z_/]+/[a-z_]+\.(?:py|sh|md)|[a-z_]+\.py)`", text)
    assert named
    gone = [
        name
        for name in named
        if not any((root / name).is_file() for root in (PROJECT_DIRECTORY, UTILS))
    ]
    assert gone == []
