"""The commands of the tutorial and of README's "Coming from ...", run as they are written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.model_presets import PRESETS
from configs.training_config import PROJECT_DIRECTORY, get_training_config

SECTION = "## Coming from ..."
COMMAND = re.compile(r"(?:python|torchrun|bash) [^`]+")
# Paid for, or on the other side of a network.
ELSEWHERE = ("bash setup.sh", "modal", "rclone", "pip")
# lm-evaluation-harness, which `make setup` does not install: tests/test_lm_evaluation_harness.py.
NEEDS_HARNESS = "--hellaswag"
# No script with words of its own; debug_gpu.py is run below.
UNPARSED = ("python -c", "python debug_gpu.py")
# What makes a training of the documents one that a test can wait for.
SMALL = (
    "sequence_length=32",
    "global_batch_size=4",
    "per_device_train_batch_size=2",
    "model_overrides.num_hidden_layers=1",
    "model_overrides.hidden_size=32",
    "model_overrides.intermediate_size=64",
    "model_overrides.num_attention_heads=4",
    "save_steps=2",
    "eval_steps=2",
    "max_eval_samples=4",
    "warmup_steps=1",
    "torch_compile=false",
    "sample_tokens=4",
)
STEPS, STEPS_RESUMED = 4, 6
NAMES = ("Lily", "Tom", "Anna", "Ben", "the dog", "the bird")
ENDINGS = ("went home.", "was happy.", "saw a big tree.", "laughed.", "ran to the river.")


def parts_of_readme() -> dict[str, list[str]]:
    """Return the commands of each sub-section, in order: title -> commands."""
    text = (PROJECT_DIRECTORY / "README.md").read_text("utf-8").split(SECTION, 1)[1]
    text = text.split("\n## ", 1)[0]
    found = {}
    for part in text.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("| ")][1:]
        cells = [row.split(" | ", 1)[1] for row in rows]
        quoted = [piece for cell in cells for piece in re.findall(r"`([^`]+)`", cell)]
        found[title] = [piece.replace("\\|", "|") for piece in quoted if COMMAND.fullmatch(piece)]
    return found


def blocks_of_tutorial() -> list[str]:
    """Return the commands and the Python code of the tutorial, in order."""
    text = (PROJECT_DIRECTORY / "docs" / "TUTORIAL.md").read_text("utf-8")
    found = []
    for kind, body in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        found += body.strip().splitlines() if kind == "bash" else []
        if kind == "python":
            found.append(f"python -c {shlex.quote(body)}")
    return found


def all_commands() -> list[str]:
    commands = [command for part in parts_of_readme().values() for command in part]
    return [command for command in commands + blocks_of_tutorial() if not is_elsewhere(command)]


def is_elsewhere(command: str) -> bool:
    return command.startswith(ELSEWHERE)


def test_each_document_has_its_commands() -> None:
    counts = [len(commands) for commands in parts_of_readme().values()]
    assert len(counts) == 4
    assert min(counts) >= 8
    assert len(blocks_of_tutorial()) >= 14


@pytest.mark.parametrize("command", [one for one in all_commands() if not one.startswith(UNPARSED)])
def test_the_command_line_knows_every_word_of_it(command: str) -> None:
    words = shlex.split(command)
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
    arguments = words[at + 1 :]
    if hasattr(module, "parse_arguments"):
        known = module.parse_arguments(arguments)
    elif arguments and arguments[0] == "inspect":
        known = module.build_command_parser().parse_args(arguments)
    else:
        known = module.build_parser().parse_args(arguments)
    config = getattr(known, "config", None) or "test"
    assert (PROJECT_DIRECTORY / "configs" / f"{config}.json").is_file()


@pytest.mark.parametrize(
    "commands",
    [*parts_of_readme().values(), blocks_of_tutorial()],
    ids=lambda words: words[-2][:40],
)
def test_the_tokenizer_has_as_many_tokens_as_the_model(commands: list[str]) -> None:
    config = next(one.split("--config ")[1].split()[0] for one in commands if "train.py" in one)
    preset = PRESETS[get_training_config(config).model]
    sizes = {size for one in commands for size in re.findall(r"--vocab-size (\d+)", one)}
    assert sizes == {str(preset.values["vocab_size"])}


@pytest.fixture
def folder(tmp_path: Path, sample_data: Path) -> Path:
    """A folder with small files under the names that the documents use."""
    stories = list(make_stories(400))
    text = "\n".join(stories)
    for name in ("train.txt", "shakespeare.txt", "file1.txt", "corpus.txt", "new.txt"):
        (tmp_path / name).write_text(text)
    (tmp_path / "file2.txt").write_text("\n".join(reversed(stories)))
    separated = "\n<|endoftext|>\n".join(stories)
    (tmp_path / "TinyStoriesV2-GPT4-train.txt").write_text(separated)
    (tmp_path / "TinyStoriesV2-GPT4-valid.txt").write_text("\n<|endoftext|>\n".join(stories[:60]))
    ids = np.random.default_rng(1).integers(0, 500, 20_000)
    ids.astype(np.uint32).tofile(tmp_path / "train.txt.tokens.bin")
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    for name, part in (("train", ids), ("val", ids[:4000])):
        (tmp_path / "shards").mkdir(exist_ok=True)
        np.save(tmp_path / "shards" / f"{name}_00000.npy", part.astype(np.int32))
    (tmp_path / "wikitext").mkdir()
    lines = [json.dumps({"text": story}) for story in stories]
    (tmp_path / "wikitext" / "train.jsonl").write_text("\n".join(lines))
    make_gpt2(tmp_path / "gpt2", sample_data)
    questions = PROJECT_DIRECTORY / "tests" / "task_files" / "hellaswag.jsonl"
    shutil.copy(questions, tmp_path / "hellaswag_val.jsonl")
    return tmp_path


def make_stories(count: int) -> Iterator[str]:
    chance = random.Random(7)
    for _ in range(count):
        names = chance.choices(NAMES, k=6)
        yield "Once upon a time " + " ".join(f"{name} {chance.choice(ENDINGS)}" for name in names)


def make_gpt2(folder: Path, sample_data: Path) -> None:
    """Write what the Hub's `gpt2` would be, small."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 512}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample_data / name, folder / name)


def shrunk(words: list[str]) -> list[str]:
    """Return the words of a training, with what makes it small behind them."""
    if not any(word.endswith("train.py") for word in words):
        return words
    steps = STEPS_RESUMED if "--max-steps" in words and "--resume" in words else STEPS
    return [*words, "--max-steps", str(steps), *(f"--set={value}" for value in SMALL)]


def run(words: list[str], folder: Path) -> str:
    """Run a command in a folder, with this Python and this project; return what it said."""
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    program = [sys.executable, *words[1:]]
    program = [
        str(PROJECT_DIRECTORY / word) if word.endswith(".py") and number < 6 else word
        for number, word in enumerate(program)
    ]
    result = subprocess.run(
        program,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, f"{shlex.join(words)}\n{said}"
    return said


@pytest.mark.slow
@pytest.mark.parametrize("title", list(parts_of_readme()))
def test_every_command_of_a_document_works(title: str, folder: Path) -> None:
    has_harness = importlib.util.find_spec("lm_eval") is not None
    for command in parts_of_readme()[title]:
        if not is_elsewhere(command) and (has_harness or NEEDS_HARNESS not in command):
            run(shrunk(shlex.split(command)), folder)


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(folder: Path) -> None:
    for command in blocks_of_tutorial():
        if not is_elsewhere(command):
            run(shlex.split(command), folder)
    assert (folder / "tinystories-model" / "model.safetensors").is_file()
