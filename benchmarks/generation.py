"""Tokens a second of generated texts: alone and eight at once, greedy and sampled.

The peer is `model.generate` of transformers on the same model, prompts and number of tokens. On a
CPU it is the 70M shape in float32, on a GPU the 1.2B one in bfloat16; weights are random.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import compare, spread
from configs.model_config import build_model_config

if TYPE_CHECKING:
    from utils.models.token_choice import Sampling

CPU_PRESET, GPU_PRESET = "pythia-70m", "refocused-1.2b"
TOKENS = 64
PROMPT_TOKENS = (12, 40, 25, 7, 33, 18, 64, 50)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
}


def measure_generate(folder: Path, runs: int) -> dict[str, str]:
    """Return tokens a second of both, and their ratio; `folder` is not used."""
    import torch

    on_gpu = torch.cuda.is_available()
    model = build_model(GPU_PRESET if on_gpu else CPU_PRESET, on_gpu=on_gpu)
    return measure_model(model, TOKENS, runs)


def build_model(preset: str, *, on_gpu: bool) -> Any:
    """Return a model with random weights, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(
        build_model_config(preset), dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    model.generation_config.eos_token_id = None  # every text has the same number of tokens
    return model.to("cuda" if on_gpu else "cpu").eval()


def measure_model(model: Any, tokens: int, runs: int) -> dict[str, str]:
    """Return the figures of a model, texts of so many tokens."""
    from utils.models.token_choice import Sampling

    vocab_size = model.config.vocab_size
    prompts = [
        [(31 * place + 7 * number) % vocab_size for place in range(length)]
        for number, length in enumerate(PROMPT_TOKENS)
    ]
    found = {}
    for kind, options in KINDS.items():
        sampling = Sampling(tokens, **options)
        for count in (1, len(prompts)):
            given = prompts[:count]
            ours, peer, ratios = compare(
                _rate(functools.partial(write, model, given, sampling)),
                _rate(functools.partial(by_peer, model, given, sampling)),
                runs,
            )
            name = f"{kind}, {count} at once"
            found[f"{name}: ours"] = spread(ours, " tokens/s")
            found[f"{name}: model.generate"] = spread(peer, " tokens/s")
            found[f"{name}: times its speed"] = spread(ratios)
    return found


def _rate(work: Callable[[], int]) -> Callable[[], float]:
    """Return a function that does work and returns the tokens a second of it."""

    def measure() -> float:
        begin = time.perf_counter()
        tokens = work()
        return tokens / (time.perf_counter() - begin)

    return measure


def write(model: Any, prompts: list[list[int]], sampling: Sampling) -> int:
    """Make texts as scripts/generate.py does; return the number of their tokens."""
    import torch

    from utils.models.generation import Batch, GrowingText, evaluating

    rows = [GrowingText(prompt, sampling) for prompt in prompts]
    batch = Batch(model, rows)
    with evaluating(model), torch.inference_mode():
        while batch.is_growing:
            batch.step()
    return sum(len(row.tokens) for row in rows)


def by_peer(model: Any, prompts: list[list[int]], sampling: Sampling) -> int:
    """Make texts as transformers does; return the number of their tokens."""
    import torch

    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options: dict[str, Any] = {"do_sample": False}
    if not sampling.is_greedy:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    output = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=sampling.max_tokens,
        pad_token_id=0,
        **options,
    )
    return int(output[:, longest:].numel())
