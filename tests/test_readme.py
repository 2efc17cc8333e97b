"""README and ARCHITECTURE.md say what is true."""

from __future__ import annotations

import dataclasses
import re

from configs.model_presets import PRESETS
from configs.training_config import PROJECT_DIRECTORY, TrainingConfig
from tests.test_architecture import module_files


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


def test_the_architecture_page_has_every_module() -> None:
    text = (PROJECT_DIRECTORY / "ARCHITECTURE.md").read_text("utf-8")
    missing = [
        name
        for name, file in module_files().items()
        if file.parent.name == "utils" and file.name not in text
    ]
    assert missing == []


def test_the_first_two_commands_of_the_readme_set_themselves_up() -> None:
    text = (PROJECT_DIRECTORY / "README.md").read_text("utf-8")
    block = text.split("```bash\n", 1)[1].split("```", 1)[0].splitlines()
    assert [line.split("#")[0].strip() for line in block] == ["bash run.sh test", "make check"]
