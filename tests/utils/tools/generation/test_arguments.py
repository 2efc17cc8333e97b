"""The words that name a model, as every command has them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from utils.tools.generation.arguments import add_model_arguments, find_from, load_found


def test_a_model_is_found_and_loaded_as_the_words_say(trained_run: Path) -> None:
    folder = trained_run / "checkpoints"
    other = str(next(folder.glob("*step4-*")))
    words = ("--device", "cpu", "--dtype", "bfloat16", "--attention", "eager", "--tokenizer", other)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    args = parser.parse_args(["2", "--output-dir", str(folder), *words])
    loaded = load_found(args, find_from(args))
    assert (loaded.source.step, loaded.model.dtype) == (2, torch.bfloat16)
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.tokenizer is not None
