"""The commands of the pages: all are read by their programs; those of the README's six commands,
the tutorial and MIGRATION.md are run as they are written."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
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
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from configs.config_files import PROJECT_DIRECTORY, parse_assignment
from configs.model_presets import PRESETS
from configs.training_config import get_training_config
from tests.test_modal_app import modal_app
from tests.test_readme import DOCS, GUIDES, README, name_of, without_first_cells

__all__ = ["modal_app"]  # the fixture

COMMAND = re.compile(r"(?:python|torchrun|bash) [^`]+")
# Paid for, or on the other side of a network.
ELSEWHERE = ("bash setup.sh", "modal", "rclone", "pip")
OPTIONAL = {"--hellaswag": "lm_eval"}  # option -> package that it needs, run where that is
# Programs whose words are those of the script that follows, or of train.py.
LAUNCHERS = ("python", "torchrun", "accelerate", "bash run.sh", "bash cloud", "sbatch", "NUM_NODES")
FOR_TRAIN = ("run.sh", "node.sh", "slurm.sbatch")
UNPARSED = ("debug_gpu.py",)  # no words of its own but --quick; some document is run with it
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


def parts_of_migration() -> dict[str, list[str]]:
    """Return the commands of each table, in order: title -> commands."""
    text = (DOCS / "MIGRATION.md").read_text("utf-8")
    found = {}
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("| ")][1:]
        cells = [row.split(" | ", 1)[1] for row in rows]
        quoted = [piece for cell in cells for piece in re.findall(r"`([^`]+)`", cell)]
        found[title] = [piece.replace("\\|", "|") for piece in quoted if COMMAND.fullmatch(piece)]
    return {title: commands for title, commands in found.items() if commands}


def blocks_of(text: str) -> list[str]:
    """Return the commands and the Python code of a text's blocks, in order."""
    found = []
    for kind, body in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        found += body.strip().replace("\\\n", " ").splitlines() if kind == "bash" else []
        if kind == "python":
            found.append(f"python -c {shlex.quote(body)}")
    return found


def blocks_of_tutorial() -> list[str]:
    return blocks_of((DOCS / "TUTORIAL.md").read_text("utf-8"))


def six_commands() -> list[str]:
    section = README.read_text("utf-8").split("## From text to a model of your own\n", 1)[1]
    return blocks_of(section.split("\n## ", 1)[0])


def commands_of(page: Path, *begin: str) -> list[list[str]]:
    """Return the words of a page's commands that begin so, in blocks and in sentences."""
    text = page.read_text("utf-8")
    lines = blocks_of(text)
    outside = without_first_cells(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines += [
        span.replace("\n", " ").replace("\\|", "|") for span in re.findall(r"`([^`]+)`", outside)
    ]
    lines = [line.partition(" > ")[0] for line in lines if line.startswith(begin)]
    return [shlex.split(line, comments=True) for line in lines]


def is_elsewhere(command: str) -> bool:
    missing = [
        option for option, name in OPTIONAL.items() if importlib.util.find_spec(name) is None
    ]
    return command.startswith(ELSEWHERE) or any(option in command for option in missing)


def parse(words: list[str]) -> argparse.Namespace | None:
    """Return what a program understands of its words; None where they name none of ours."""
    at = next((i for i, word in enumerate(words) if word.endswith((".py", *FOR_TRAIN))), None)
    if at is None or "--help" in words or words[at] in UNPARSED:
        return None
    program, given = words[at], words[at + 1 :]
    assert (PROJECT_DIRECTORY / program).is_file()
    if program == "run.sh" and given[1:2] and given[1].isdigit():
        given = [given[0], "--max-steps", *given[1:]]
    if program == "run.sh":
        given = ["--config", *given]
    if program.endswith(FOR_TRAIN):
        program = "train.py"
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parse_arguments"):
        return module.parse_arguments(given)  # type: ignore[no-any-return]
    of_data = program.endswith("prepare_data.py") and given and not given[0].startswith("-")
    parser = module.build_command_parser() if of_data else module.build_parser()
    return parser.parse_args(given)  # type: ignore[no-any-return]


def test_each_document_has_its_commands() -> None:
    counts = [len(commands) for commands in parts_of_migration().values()]
    assert len(counts) == 4
    assert min(counts) >= 8
    assert len(blocks_of_tutorial()) >= 14
    assert len(six_commands()) == 6


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    for words in commands_of(page, *LAUNCHERS):
        known = parse(words)
        settings = dict(parse_assignment(text) for text in getattr(known, "set", None) or [])
        config = getattr(known, "config", None) or "test"
        if config in ("NAME", "mine"):  # to be written by the reader
            config = "test"
        assert get_training_config(config, settings), words


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_modal_command_has_its_options(page: Path, modal_app: ModuleType) -> None:
    for words in commands_of(page, "modal run cloud/", "modal run --detach cloud/"):
        at = next(number for number, word in enumerate(words) if "::" in word)
        name = words[at].partition("::")[2]
        parameters: Any = inspect.signature(modal_app.app.entrypoints[name]).parameters
        options = [word[2:].replace("-", "_") for word in words[at:] if word.startswith("--")]
        assert [option for option in options if option not in parameters] == [], words
        needed = {key for key, one in parameters.items() if one.default is one.empty}
        assert not options or needed <= set(options), words


@pytest.mark.parametrize(
    "commands",
    [*parts_of_migration().values(), blocks_of_tutorial()],
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


def run(words: list[str], folder: Path, project: Path = PROJECT_DIRECTORY) -> None:
    """Run a command of a project in a folder, with this Python."""
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    program = [sys.executable, *words[1:]]
    program = [
        str(project / word) if word.endswith(".py") and number < 6 else word
        for number, word in enumerate(program)
    ]
    result = subprocess.run(
        program,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,  # only ends a command that hangs
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, f"{shlex.join(words)}\n{said}"


@pytest.mark.slow
@pytest.mark.parametrize("title", list(parts_of_migration()))
def test_every_command_of_a_document_works(title: str, folder: Path) -> None:
    for command in parts_of_migration()[title]:
        if not is_elsewhere(command):
            run(shrunk(shlex.split(command)), folder)


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(folder: Path) -> None:
    for command in blocks_of_tutorial():
        if not is_elsewhere(command):
            run(shlex.split(command), folder)
    assert (folder / "tinystories-model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_six_commands_of_the_readme_make_a_model(folder: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for name in ("configs", "scripts", "utils"):
        shutil.copytree(PROJECT_DIRECTORY / name, clone / name)
    shutil.copy(PROJECT_DIRECTORY / "train.py", clone)
    values = json.loads(README.read_text("utf-8").split("```json\n", 1)[1].split("```", 1)[0])
    values |= {"max_steps": STEPS, "save_steps": 2, "warmup_steps": 1}
    (clone / "configs" / "mine.json").write_text(json.dumps(values))
    (clone / "texts").mkdir()
    shutil.copy(folder / "train.txt", clone / "texts")
    shutil.copy(folder / "file2.txt", clone / "texts")
    for command in six_commands():
        run(shlex.split(command, comments=True), clone, clone)
    assert (clone / "my-model" / "model.safetensors").is_file()
