"""Small models and their tokenizer, to be measured; and measures as simple as they can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.model_config import build_model_config
from configs.training_config import get_training_config
from utils.training_utils import TrainState, build_accelerator, build_train_state, set_determinism

TASK_FILES = Path(__file__).parent / "task_files"


def build_small_model(vocab_size: int = 512, context: int = 64, **shape: Any) -> Any:
    """Return a GPT-NeoX of random weights, large enough for its logits to differ."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=context,
        eos_token_id=0,
        bos_token_id=0,
        **shape,
    )
    torch.manual_seed(5)
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


@contextlib.contextmanager
def training_state(settings: Mapping[str, Any], folder: Path = Path()) -> Iterator[TrainState]:
    """Give a train state of the configuration `test` with these settings, on a CPU."""
    from accelerate.state import AcceleratorState, GradientState

    config = get_training_config("test", {"use_cpu": True, **settings})
    set_determinism(config)
    try:
        accelerator = build_accelerator(config, "no", [], folder)
        model_config = build_model_config(config.model, config.model_overrides)
        yield build_train_state(accelerator, model_config, config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def plain_losses(model: Any, tokens: list[int], context: int) -> list[float]:
    """Return the loss of each token but the first, one forward for each, summed by nobody.

    Token i is predicted from those before it in its window: windows begin at 0, `context`, ...
    """
    losses = []
    with torch.no_grad():
        for place in range(1, len(tokens)):
            begin = (place - 1) // context * context
            seen = torch.tensor([tokens[begin:place]])
            logits = model(input_ids=seen).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[tokens[place]]))
    return losses
