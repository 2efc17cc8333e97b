"""The words that name a model, as every command has them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from utils.tools.generation.arguments import add_model_arguments, find_from, load_found


def parse(*words: str, several: bool = False, loads: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, several=several, loads=loads)
    return parser.parse_args(words)


def test_a_model_is_found_and_loaded_as_the_words_say(trained_run: Path) -> None:
    folder = trained_run / "checkpoints"
    other = str(next(folder.glob("*step4-*")))
    words = ("--device", "cpu", "--dtype", "bfloat16", "--attention", "eager", "--tokenizer", other)
    args = parse("2", "--output-dir", str(folder), *words)
    loaded = load_found(args, find_from(args))
    assert (loaded.source.step, loaded.model.dtype) == (2, torch.bfloat16)
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.tokenizer is not None


def test_several_models_are_found_one_by_one(trained_run: Path) -> None:
    where = ("--output-dir", str(trained_run / "checkpoints"))
    args = parse("latest", "2", *where, several=True, loads=False)
    assert [find_from(args, text).step for text in args.models] == [4, 2]
    assert not hasattr(args, "device")


@pytest.mark.parametrize("words", [("latest", "--dtype", "float8"), ("latest", "--attention")])
def test_words_that_mean_nothing_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
