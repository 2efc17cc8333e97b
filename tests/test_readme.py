"""README and ARCHITECTURE.md say what is true."""

from __future__ import annotations

import dataclasses
import re

from configs.model_presets import PRESETS
from configs.training_config import PROJECT_DIRECTORY, TrainingConfig
from tests.test_architecture import UTILS, listed_rooms


def test_the_readme_has_every_configuration_key_and_no_other() -> None:
    text = (PROJECT_DIRECTORY / "README.md").read_text("utf-8")
    table = text.split("| key | default |", 1)[1].split("\n\n", 1)[0]
    named = {
        key
        for row in table.splitlines()
        if row.startswith("| `")
        for key in re.findall(r"`([a-z_0-9]+)`", row.split("|")[1])
    }
    assert named == {field.name for field in dataclasses.fields(TrainingConfig)}


def test_the_readme_names_every_preset() -> None:
    text = (PROJECT_DIRECTORY / "README.md").read_text("utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in text] == []


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


def test_the_first_two_commands_of_the_readme_set_themselves_up() -> None:
    text = (PROJECT_DIRECTORY / "README.md").read_text("utf-8")
    block = text.split("```bash\n", 1)[1].split("```", 1)[0].splitlines()
    assert [line.split("#")[0].strip() for line in block] == ["bash run.sh test", "make check"]
