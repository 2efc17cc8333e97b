"""Muon as torch has it, but for bfloat16; AdamW for all else."""

from __future__ import annotations

import copy

import pytest
import torch

from configs.training_config import TrainingConfig
from tests.small_models import build_small_model
from utils.training.muon import orthogonalize
from utils.training_utils import build_optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def iterate(matrix: torch.Tensor) -> torch.Tensor:
    """Return the Newton-Schulz iteration as it is defined, in float64."""
    found = matrix.double() / matrix.double().norm().clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(5):
        gram = found @ found.T
        found = first * found + (third * gram + fifth * gram @ gram) @ found
    return found.float()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (1, 7)])
@pytest.mark.parametrize("rank", [0, 1, 5, 48])
def test_products_by_the_gram_matrix_are_those_of_the_definition(
    shape: tuple[int, int], rank: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(size, rank, generator=generator) for size in shape)
    found = orthogonalize(left @ right.T, COEFFICIENTS, 5, 1e-7)
    # Rounding, 6e-8, grows as what is nearly 0 does: 3.4445 times in each iteration.
    torch.testing.assert_close(found, iterate(left @ right.T), rtol=0, atol=1e-3)


def test_an_update_is_that_of_torchs_muon_and_adamw() -> None:
    model = build_small_model()
    plain = copy.deepcopy(model)
    config = TrainingConfig(
        optim="muon", learning_rate=0.01, muon_learning_rate=0.02, muon_momentum=0.9
    )
    optimizer = build_optimizer(model, config)
    hidden = {n: p for n, p in plain.named_parameters() if "layers" in n and p.dim() == 2}
    others = {n: p for n, p in plain.named_parameters() if n not in hidden}
    muon = torch.optim.Muon(
        hidden.values(), lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [p for p in others.values() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((2, 0.1), (1, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
        for name, parameter in model.named_parameters():
            theirs = dict(plain.named_parameters())[name]
            if name in others:
                assert torch.equal(parameter, theirs), name
                continue
            # bfloat16 rounds to 1 in 256.
            assert (parameter - theirs).norm() < 0.03 * (parameter - before[name]).norm(), name
            theirs.data.copy_(parameter)
    ours = [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[2]["params"]]
    for one, other in zip(ours, hidden.values(), strict=True):
        assert torch.equal(one, muon.state[other]["momentum_buffer"])
