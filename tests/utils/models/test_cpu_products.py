"""Products by oneDNN are those of the default library, and are taken where they are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody names it

from utils.models import cpu_products
from utils.models.cpu_products import CpuLinear, linear, product_operations, use_cpu_products

NEEDS_ONEDNN = pytest.mark.skipif(
    not product_operations(), reason="this torch is built without oneDNN's products"
)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "is_onednn_faster", lambda: True)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of oneDNN's operator."""
    calls: list[int] = []
    operator = torch.ops.mkldnn._linear_pointwise

    class Namespace:
        @staticmethod
        def _linear_pointwise(*arguments: object) -> object:
            calls.append(1)
            return operator(*arguments)

    monkeypatch.setattr(torch.ops, "mkldnn", Namespace)
    return calls


@NEEDS_ONEDNN
@pytest.mark.parametrize("shape", [(5, 7), (1, 3, 7), (2, 3, 4, 7), (1, 7)])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_default_library(
    monkeypatch: pytest.MonkeyPatch,
    faster: None,
    *,
    shape: tuple[int, ...],
    is_transposed: bool,
    has_bias: bool,
) -> None:
    calls = counted(monkeypatch)
    inputs = torch.randn(shape)
    weight = torch.randn(7, 11).t() if is_transposed else torch.randn(11, 7)
    bias = torch.randn(11) if has_bias else None
    torch.testing.assert_close(linear(inputs, weight, bias), F.linear(inputs, weight, bias))
    assert calls == [1]


@NEEDS_ONEDNN
def test_gradients_are_those_of_a_linear_layer(
    monkeypatch: pytest.MonkeyPatch, faster: None
) -> None:
    plain = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4, bias=False))
    other = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4, bias=False))
    other.load_state_dict(plain.state_dict())
    use_cpu_products(other)
    assert [type(part) for part in other if not isinstance(part, nn.GELU)] == [CpuLinear] * 2
    assert other.state_dict().keys() == plain.state_dict().keys()
    calls = counted(monkeypatch)
    samples = torch.randn(2, 5, 6).transpose(0, 1)
    for model in (plain, other):
        inputs = samples.clone().requires_grad_()
        torch.autograd.backward(model(inputs).square().sum())
        model.register_buffer("inputs_grad", inputs.grad)
    assert calls == [1] * 4  # two outputs, two gradients of inputs
    torch.testing.assert_close(other.inputs_grad, plain.inputs_grad)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad)
        assert two.grad is not None
        assert two.grad.stride() == two.stride()


@NEEDS_ONEDNN
def test_other_precisions_stay_with_torch(monkeypatch: pytest.MonkeyPatch, faster: None) -> None:
    layer = nn.Linear(4, 4)
    use_cpu_products(layer)
    calls = counted(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert calls == []


def test_only_a_measured_processor_takes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_products, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu_products, "product_operations", lambda: frozenset({"it is there"}))
    ask = cpu_products.is_onednn_faster.__wrapped__
    for capability, vendor, expected in (
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=capability: kind)
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
        assert ask() is expected
    (tmp_path / "cpuinfo").unlink()  # no Linux
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert ask() is False
    layer = nn.Linear(2, 2)
    monkeypatch.setattr(cpu_products, "is_onednn_faster", lambda: False)
    use_cpu_products(layer)
    assert type(layer) is nn.Linear
