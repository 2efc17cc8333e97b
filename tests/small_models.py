"""Small models and their tokenizer, to be measured; and measures as simple as they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
