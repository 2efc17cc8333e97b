"""GPT-2, Llama and their like: recomputed, estimated and decayed as they are built."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import CPU_SEQUENCE_LENGTH, measure_peak
from configs.model_config import build_model_config
from configs.model_presets import PRESETS
from configs.training_config import TrainingConfig
from tests.sample_models import FAMILIES, write_model
from utils.base.errors import ConfigError
from utils.models.building import LossModel, build_model, count_parameters
from utils.models.estimates import ModelShape, activation_bytes, attention_widths, selective_bytes
from utils.start.facts import RunFacts
from utils.start.step_probe import measure_step
from utils.training_utils import build_optimizer, find_utilization, forward_loss

TOKENS = torch.arange(48).reshape(2, 24)
# Wide enough for what does not grow with the width to be small.
WIDE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8}
CPU_TOLERANCE = 0.15
CASES = [
    ("neox-tiny", {}),
    ("gpt2", {}),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
    ("llama", {"num_key_value_heads": 8}),
    ("llama", {"num_key_value_heads": 2}),
    ("mistral", {}),
    ("olmo2", {}),
    ("qwen3", {"head_dim": 32}),
]


def training(policy: str) -> TrainingConfig:
    return TrainingConfig(
        gradient_checkpointing=bool(policy), gradient_checkpointing_policy=policy or "full"
    )


def built(tmp_path: Path, family: str, policy: str = "") -> LossModel:
    torch.manual_seed(0)
    config = build_model_config(write_model(tmp_path, family) if family in FAMILIES else family)
    return LossModel(build_model(config, training(policy)))


def loss_and_gradients(model: LossModel) -> list[torch.Tensor]:
    loss = model(TOKENS)
    torch.autograd.backward(loss)
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["neox-tiny", "gpt2", "llama"])
def test_recomputing_changes_no_number(tmp_path: Path, family: str) -> None:
    plain = loss_and_gradients(built(tmp_path, family))
    for policy in ("full", "selective"):
        again = loss_and_gradients(built(tmp_path, family, policy))
        assert len(plain) == len(again) > 18
        assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True)), policy


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_gradient_and_matrices_alone_decay(tmp_path: Path, family: str) -> None:
    model = built(tmp_path, family)
    loss_and_gradients(model)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # The row of id 1 too, which is the padding id of some families and a word of the data.
    embedding = model.core.get_input_embeddings()
    assert embedding.weight.grad[1].abs().max() > 0
    decayed, kept = build_optimizer(model, TrainingConfig()).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(
        "norm" in names[id(p)] or "ln_" in names[id(p)] or "bias" in names[id(p)]
        for p in kept["params"]
    )
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_widths_of_attention_are_those_of_its_heads(tmp_path: Path) -> None:
    wanted = {"gpt2": (32, 32), "llama": (32, 16), "qwen3": (64, 32)}
    for family, widths in wanted.items():
        config = build_model_config(write_model(tmp_path, family))
        assert attention_widths(config) == widths
        shape = ModelShape.of(config, 0, 0)
        assert (shape.attention_width, shape.key_width) == widths
        assert (shape.intermediate, shape.is_gated) == (64, family != "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_flops_of_a_token_are_those_that_torch_counts(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # It does not know oneDNN's products.
    monkeypatch.setattr("utils.models.cpu_products.is_onednn_faster", lambda: False)
    config = build_model_config(write_model(tmp_path, family, tie_word_embeddings=True))
    core = build_model(config, TrainingConfig(attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(LossModel(core, "chunked")(TOKENS))
    cost = find_utilization(
        config, count_parameters(config).total, TOKENS.shape[1], torch.device("cpu"), "no", 1
    )
    added = [n for n, p in core.named_parameters() if p.dim() < 2 or "wpe" in n]  # not multiplied
    rest = 6 * sum(core.get_parameter(name).numel() for name in added)
    # Some versions make the angles of the positions by a product.
    angles = sum(counter.get_flop_counts().get("LossModel.core.model.rotary_emb", {}).values())
    flops = counter.get_total_flops() - angles
    assert flops == (cost.flops_per_token - rest) * TOKENS.numel()


def kept_bytes(config: Any, tokens: int, *, bf16: bool, policy: str) -> int:
    """Return the bytes that are allocated in a forward pass and still there after it."""
    model = LossModel(build_model(config, training(policy)))
    gc.collect()  # what goes meanwhile would count as if it had been there
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = forward_loss(model, torch.zeros((1, tokens), dtype=torch.int64), None)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in watched.key_averages())


def assert_kept(
    tmp_path: Path, family: str, values: dict[str, Any], policy: str, *, bf16: bool
) -> None:
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    path = write_model(tmp_path, family, **{positions: 256}) if family in FAMILIES else family
    wide = WIDE if family in FAMILIES else {}
    configs = [build_model_config(path, {**wide, **values, "num_hidden_layers": n}) for n in (1, 3)]
    few, many = (
        [kept_bytes(config, tokens, bf16=bf16, policy=policy) for config in configs]
        for tokens in (64, 128)
    )
    of_a_token = ((many[1] - many[0]) - (few[1] - few[0])) / 2 / 64
    precision, shape = "bf16" if bf16 else "no", ModelShape.of(configs[0], 0, 0)
    layer, layer_input = activation_bytes(shape, precision)
    wanted = {"": layer, "full": layer_input, "selective": selective_bytes(shape, precision)}
    assert of_a_token == pytest.approx(wanted[policy], rel=0.015)


@pytest.mark.parametrize(
    ("family", "values", "policy", "bf16"),
    [
        ("neox-tiny", {}, "", False),
        ("neox-tiny", {}, "selective", True),
        ("llama", {"num_key_value_heads": 2}, "", True),
    ],
)
def test_a_layer_keeps_what_autograd_keeps(
    tmp_path: Path, family: str, values: dict[str, Any], policy: str, *, bf16: bool
) -> None:
    assert_kept(tmp_path, family, values, policy, bf16=bf16)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("policy", ["", "full", "selective"])
@pytest.mark.parametrize(("family", "values"), CASES)
def test_a_layer_of_any_family_keeps_what_autograd_keeps(
    tmp_path: Path, family: str, values: dict[str, Any], policy: str, *, bf16: bool
) -> None:
    assert_kept(tmp_path, family, values, policy, bf16=bf16)


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "qwen3"])
def test_a_small_step_of_another_family_is_timed(tmp_path: Path, family: str) -> None:
    config = TrainingConfig(model=write_model(tmp_path, family), sequence_length=32)
    model_config = build_model_config(config.model)
    counts = count_parameters(model_config)
    facts = RunFacts(config, model_config, counts, "no", torch.device("cpu"), 1)
    found = measure_step(facts, 2**40)
    assert found is not None
    assert found.step_seconds > 0


def one_step(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    config = build_model_config(name)
    model = LossModel(build_model(config, TrainingConfig(model=name)))
    optimizer = build_optimizer(model, TrainingConfig(model=name, learning_rate=1e-3))
    batch = torch.arange(tokens).unsqueeze(0)
    before = forward_loss(model, batch, None)
    assert before.item() == pytest.approx(torch.tensor(config.vocab_size).log().item(), abs=0.8)
    torch.autograd.backward(before)
    optimizer.step()
    assert forward_loss(model, batch, None).item() < before.item()


SMALL = [name for name, preset in PRESETS.items() if preset.parameters < 100_000_000]
QUICK = [name for name in SMALL if PRESETS[name].parameters < 20_000_000]


@pytest.mark.parametrize("name", QUICK)
def test_a_step_of_a_small_preset_lowers_its_loss(name: str) -> None:
    one_step(name, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(name for name in SMALL if name not in QUICK), "gpt2", "llama-138m"]
)
def test_a_step_of_a_larger_preset_lowers_its_loss(name: str) -> None:
    one_step(name, 8)


def test_fp8_is_not_taken_for_layers_without_linear_parts(tmp_path: Path) -> None:
    config = build_model_config(write_model(tmp_path, "gpt2"))
    with pytest.raises(ConfigError, match="those of GPT-2 are of another kind"):
        build_model(config, TrainingConfig(fp8=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
@pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the GPU of this machine")
def test_the_estimate_of_a_llama_is_within_15_percent_of_resident_memory(tmp_path: Path) -> None:
    result = measure_peak(tmp_path, "tinystories", 2, CPU_SEQUENCE_LENGTH)
    assert result["estimated"] == pytest.approx(result["measured"], rel=CPU_TOLERANCE)
