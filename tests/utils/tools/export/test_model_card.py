"""A model card says what is known of a model, and nothing in it is Markdown of somebody else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from configs.config_files import TRAINING_CONFIG_FILE
from configs.training_config import get_training_config
from tests.sample_checkpoints import make_metadata
from utils.checkpoints.layout import METADATA_FILE, FileEntry, Manifest
from utils.remote.loading import LoadedModel, ModelSource
from utils.tools.export.model_card import HYPERPARAMETERS, build_card, escape

MANIFEST = Manifest(
    "20260101-0a1b2c3d",
    50,
    1,
    1,
    {
        "model.safetensors": FileEntry(5, "AAAAAA=="),
        "optimizer-part-00001-of-00002.safetensors": FileEntry(5, "BBBBBB=="),
        "config.json": FileEntry(5, "CCCCCC=="),
        METADATA_FILE: FileEntry(5, "DDDDDD=="),
        TRAINING_CONFIG_FILE: FileEntry(5, "EEEEEE=="),
    },
)
CONFIG = {"model_type": "gpt_neox", "vocab_size": 512, "tie_word_embeddings": False}
TRAINING = {"model": "neox-tiny", "learning_rate": 4e-3, "data_uri": "/home/me/secret"}

MakeCard = Callable[..., str]


@pytest.fixture
def make_card(tmp_path: Path) -> MakeCard:
    """Return a function that makes the card of a checkpoint of these values."""

    def make(
        name: str = "checkpoint-epoch0-step50-files0",
        config: Mapping[str, Any] = CONFIG,
        metadata: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] = TRAINING,
    ) -> str:
        found = make_metadata(50) if metadata is None else metadata
        (tmp_path / METADATA_FILE).write_text(json.dumps(found))
        (tmp_path / TRAINING_CONFIG_FILE).write_text(json.dumps(training))
        return build_card(loaded(ModelSource(name, str(tmp_path), MANIFEST), config))

    return make


def loaded(source: ModelSource, config: Mapping[str, Any]) -> LoadedModel:
    model = SimpleNamespace(
        config=SimpleNamespace(**config), dtype="torch.float32", num_parameters=lambda: 5256704
    )
    return LoadedModel(source, model, None)


def test_a_card_has_the_facts_of_the_run_and_no_paths(make_card: MakeCard) -> None:
    card = make_card()
    for row in (
        "| parameters | 5,256,704 |",
        "| input and output embeddings tied | no |",
        "| steps | 50 |",
        "| tokens seen | 102,400 |",
        "| preset | neox-tiny |",
        "| learning_rate | 0.004 |",
        "| run | 20260101-0a1b2c3d |",
        r"| crc32c of model.safetensors | AAAAAA\=\= |",
        "| torch | 2.13.0 |",
    ):
        assert row in card
    assert "| validation loss | 6.5" in card
    assert "secret" not in card
    assert "2026-01-01" not in card
    assert card.count("crc32c") == 1
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["text-generation", "gpt_neox"],
    }


def test_a_model_of_the_hub_is_named_as_its_base() -> None:
    card = build_card(loaded(ModelSource("owner/model", "owner/model"), CONFIG))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/model"
    assert "exported from owner\\/model" in card
    assert "## Training" not in card


@pytest.mark.parametrize(
    "text",
    ["</td><script>alert(1)</script>", "a | b\n| c", "[x](http://evil)", "`code`", "\x1b[31m"],
)
def test_what_files_say_is_text(make_card: MakeCard, text: str) -> None:
    hostile = make_card(
        name=text,
        config={"model_type": text},
        metadata={"system_info": {"torch": text}, "git_commit": text, "current_loss": text},
        training={"model": text, "seed": [text]},
    )
    plain = make_card(
        name="x",
        config={"model_type": "x"},
        metadata={"system_info": {"torch": "x"}, "git_commit": "x", "current_loss": "x"},
        training={"model": "x", "seed": ["x"]},
    )
    begin, front, body = hostile.split("---\n", 2)
    assert begin == ""
    assert yaml.safe_load(front)["tags"] == ["text-generation", text]
    assert text not in body
    assert body.count("\n") == plain.split("---\n", 2)[2].count("\n")
    assert "\x1b" not in hostile
    assert escape(text).replace("\\", "").replace("?", "") == text.replace("\n", "").replace(
        "\x1b", ""
    ).replace("\\", "")


@pytest.mark.parametrize("metadata", [{}, {"training_progress": 3, "validation_metrics": None}])
def test_what_is_not_known_has_no_row(make_card: MakeCard, metadata: dict[str, Any]) -> None:
    card = make_card(metadata=metadata, training={})
    assert "tokens seen" not in card
    assert "None" not in card


def test_numbers_that_are_none_are_text(make_card: MakeCard) -> None:
    card = make_card(metadata={"current_loss": math.nan})
    assert "| training loss | nan |" in card


def test_every_hyperparameter_is_one_of_the_configuration() -> None:
    config = get_training_config("test")
    assert [key for key in HYPERPARAMETERS if not hasattr(config, key)] == []
