"""Models that recompute, that are compiled, that have a padded vocabulary."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.model_config import build_model_config, known_vocab_size
from configs.training_config import TrainingConfig
from tests.small_models import training_state
from tests.utils.models.test_cpu_products import NEEDS_ONEDNN
from utils import training_utils
from utils.base.errors import ConfigError
from utils.models import cpu_products
from utils.models.building import (
    LossModel,
    build_model,
    compile_model,
    find_layers,
    require_kernels,
    undo_compilation,
)
from utils.models.cpu_products import use_cpu_products

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 101}
TOKENS = torch.arange(48).reshape(2, 24) % 101


def built(**settings: Any) -> LossModel:
    torch.manual_seed(0)
    config = TrainingConfig(model="neox-tiny", model_overrides=SHAPE, **settings)
    return LossModel(build_model(build_model_config("neox-tiny", SHAPE), config))


class Products(TorchDispatchMode):
    """Counts products of matrices and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += any(f"aten.{product}." in name for product in ("mm", "addmm", "bmm"))
        self.count += "_linear_pointwise" in name
        self.attentions += "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=NEEDS_ONEDNN)])
def test_selective_recomputing_repeats_no_product(
    monkeypatch: pytest.MonkeyPatch, *, by_onednn: bool
) -> None:
    monkeypatch.setattr("utils.models.cpu_products.is_onednn_faster", lambda: by_onednn)
    counts = {}
    for policy in ("none", "full", "selective"):
        settings = {"gradient_checkpointing_policy": policy} if policy != "none" else {}
        model = built(gradient_checkpointing=policy != "none", **settings)
        use_cpu_products(model)
        with Products() as products:
            torch.autograd.backward(model(TOKENS))
        counts[policy] = (products.count, products.attentions)
    # A layer has four products and an attention in its forward pass. Nobody needs the last again,
    # but a function of Python keeps its inputs only when it is done.
    repeated = 4 if by_onednn else 3
    assert counts["selective"] == counts["none"]
    assert counts["full"] == (counts["none"][0] + 2 * repeated, counts["none"][1] + 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler
def test_compilation_is_of_layers_or_of_the_model_and_can_be_taken_back() -> None:
    model = built()
    names = list(model.core.state_dict())
    compile_model(model, by_layer=True)
    assert [part._compiled_call_impl is not None for part in find_layers(model.core)] == [True] * 2
    assert model.core.base_model._compiled_call_impl is None
    undo_compilation(model)
    assert not any(part._compiled_call_impl for part in model.modules())
    compile_model(model, by_layer=False)
    assert model.core.base_model._compiled_call_impl is not None
    assert list(model.core.state_dict()) == names


def train_state(folder: Path, **settings: Any) -> contextlib.AbstractContextManager[Any]:
    """Give the train state of a small model."""
    shape = {f"model_overrides.{key}": value for key, value in SHAPE.items()}
    return training_state(
        {"cache_dir": str(folder), "sequence_length": 16, **shape, **settings}, folder
    )


def test_a_compiler_that_fails_is_told_of_and_training_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: torch.nn.Module, *_: Any, **__: Any) -> None:
        def call(*_: Any, **__: Any) -> None:
            raise RuntimeError("no compiler\nand more of it")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    monkeypatch.setattr(cpu_products, "is_onednn_faster", lambda: False)
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING), train_state(tmp_path, torch_compile=True) as state:
        assert "does not work here, training goes on without: no compiler" in caplog.text
        assert "and more" not in caplog.text
        before = [p.clone() for p in state.loss_model.parameters()]
        training_utils.train_step(state, [torch.zeros((1, 16), dtype=torch.int64)] * 4, 1.0)
    assert not torch.equal(random_state, torch.get_rng_state())  # the weights were drawn
    assert any(
        not torch.equal(old, new)
        for old, new in zip(before, state.loss_model.parameters(), strict=True)
    )


def test_nothing_is_compiled_where_the_products_of_this_processor_are_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_products, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(training_utils, "_compile", lambda *_: pytest.fail("compiled"))
    with caplog.at_level(logging.INFO), train_state(tmp_path, torch_compile=True) as state:
        parts = list(state.loss_model.modules())
    assert any(isinstance(part, cpu_products.CpuLinear) for part in parts)
    assert "Not compiled: oneDNN's matrix products make a step shorter" in caplog.text


def test_trying_the_compiler_draws_no_random_number_and_leaves_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(cpu_products, "is_onednn_faster", lambda: False)
    states = []
    settings = {"model_overrides.attention_dropout": 0.5}
    for compiles in (False, True):
        with train_state(tmp_path, torch_compile=compiles, **settings) as state:
            states.append(torch.get_rng_state())
            assert all(p.grad is None for p in state.loss_model.parameters())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("settings", "precision", "device", "reason"),
    [
        ({"attn_implementation": "flex_attention"}, "no", "cpu", "flex_attention trains on a CUDA"),
        ({"attn_implementation": "flash_attention_2"}, "bf16", "cpu", "this is cpu. Set it to sdp"),
        ({"attn_implementation": "flash_attention_2"}, "no", "cuda", "needs bf16 or fp16"),
        ({"attn_implementation": "flash_attention_3"}, "bf16", "cuda", "3: .*installed"),
        ({"fp8": True}, "bf16", "cpu", r"float8 \(Ada, Hopper or newer\), this is cpu"),
        ({"fp8": True}, "bf16", "old", "this is an old GPU"),
        ({"fp8": True}, "fp16", "cuda", "fp8 needs bf16"),
        ({"fp8": True}, "bf16", "cuda", "fp8 needs the package torchao"),
    ],
)
def test_what_the_device_cannot_do_is_refused_before_anything_is_built(
    settings: dict[str, Any],
    precision: str,
    device: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capability = (7, 5) if device == "old" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainingConfig(model="neox-tiny", model_overrides=SHAPE, **settings)
    kind = torch.device("cpu" if device == "cpu" else "cuda")
    model_config = build_model_config("neox-tiny", SHAPE)
    with pytest.raises(ConfigError, match=reason):
        require_kernels(config, model_config, precision, kind)
    for attention in ("sdpa", "eager"):  # of torch itself, never refused
        config = TrainingConfig(attn_implementation=attention)
        require_kernels(config, model_config, "no", torch.device("cpu"))


def test_what_is_not_installed_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"attn_implementation flash_attention_2: .*installed"):
        built(attn_implementation="flash_attention_2")
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(ConfigError, match="fp8 needs the package torchao"):
        built(fp8=True)


@pytest.mark.parametrize(("size", "multiple", "padded"), [(101, 64, 128), (128, 64, 128)])
def test_a_padded_vocabulary_is_larger_and_knows_its_own_size(
    tmp_path: Path, size: int, multiple: int, padded: int
) -> None:
    from transformers import AutoConfig

    overrides = {**SHAPE, "vocab_size": size}
    config = build_model_config("neox-tiny", overrides, pad_vocab_to_multiple_of=multiple)
    assert (config.vocab_size, known_vocab_size(config)) == (padded, size)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.vocab_size, known_vocab_size(again)) == (padded, size)
