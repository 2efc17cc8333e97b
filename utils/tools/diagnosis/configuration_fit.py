"""Which configurations fit this machine, and roughly how long they take: pure functions.

    configs/*.json, memory of a device, its measured speed -> Forecast -> debug_gpu.py

Memory is that of utils/models/estimates.py, time is FLOPs over the speed of the small model's step,
which a larger model on a GPU often exceeds. `train.py --dry-run` says more. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

from configs.model_config import (
    build_model_config,
    get_preset,
    is_loss_chunked,
    is_model_file,
)
from configs.training_config import TrainingConfig
from utils.base.text import format_bytes
from utils.models.estimates import ModelShape, StepSetup, estimate_training_memory
from utils.models.mfu import flops_per_token
from utils.tools.diagnosis.diagnosis import NOTE, PROBLEM, Finding

CONFIGURATIONS = ("test", "production")
MEMORY_RESERVE = 0.95
NEARLY_FULL = 0.7
# Where the configuration as it is does not fit, these are tried, in this order.
SMALLER = ("gradient_checkpointing=true", "per_device_train_batch_size=1")


@dataclass(frozen=True)
class Forecast:
    """What a configuration needs on one device.

    Attributes:
        configuration: Its name.
        model: Name of its preset.
        max_steps: Its length.
        needed_bytes: As it is.
        available_bytes: In the device.
        settings: What has to be set for it to fit; empty where it fits as it is.
        fits: Whether it fits, with `settings`.
        seconds: For all of its steps on this one device, None where no speed is known.
    """

    configuration: str
    model: str
    max_steps: int
    needed_bytes: int
    available_bytes: int
    settings: tuple[str, ...]
    fits: bool
    seconds: float | None


def forecast_run(
    name: str,
    config: TrainingConfig,
    *,
    available_bytes: int,
    precision: str,
    device: str,
    flops_per_second: float | None,
) -> Forecast:
    """Return whether a configuration fits a device, and how long it takes there.

    Args:
        name: Of the configuration.
        config: Its values.
        available_bytes: Free memory of the device.
        precision: Mixed precision: no, bf16 or fp16.
        device: Its type, as torch names it.
        flops_per_second: Measured in a training step, None where it was not.
    """
    variants = [
        (settings, _needed_bytes(config, precision, device, checkpointing, micro_batch))
        for settings, checkpointing, micro_batch in _variants(config)
    ]
    limit = available_bytes * MEMORY_RESERVE
    settings = next((settings for settings, needed in variants if needed <= limit), None)
    samples, _ = config.resolve_batch(1)
    shape = _shape(config)
    each = flops_per_token(
        shape.parameters, shape.layers, shape.attention_width, config.sequence_length
    )
    flops = each * samples * config.sequence_length * config.max_steps
    return Forecast(
        configuration=name,
        model=config.model,
        max_steps=config.max_steps,
        needed_bytes=variants[0][1],
        available_bytes=available_bytes,
        settings=settings or (),
        fits=settings is not None,
        seconds=flops / flops_per_second if flops_per_second else None,
    )


def _variants(config: TrainingConfig) -> Iterator[tuple[tuple[str, ...], bool, int]]:
    """Yield settings with what they come to: gradient checkpointing, micro-batch."""
    micro_batch = config.per_device_train_batch_size
    yield (), config.gradient_checkpointing, micro_batch
    if not config.gradient_checkpointing:
        yield SMALLER[:1], True, micro_batch
    if micro_batch > 1:
        yield SMALLER[config.gradient_checkpointing :], True, 1


def _shape(config: TrainingConfig) -> ModelShape:
    """Return the sizes of a model."""
    if is_model_file(config.model):
        return _shape_of_file(config)
    preset = get_preset(config.model)
    values = SimpleNamespace(
        model_type=preset.model_type, **{**preset.values, **config.model_overrides}
    )
    tables = 1 if values.tie_word_embeddings else 2
    embedding = tables * values.vocab_size * values.hidden_size
    shape = ModelShape.of(values, preset.parameters, embedding)
    if not config.model_overrides:
        return shape
    # Matrices of attention and feed-forward; norms, biases and positions are left out.
    attention = 2 * (shape.attention_width + shape.key_width)
    layer = shape.hidden * (attention + (2 + shape.is_gated) * shape.intermediate)
    return replace(shape, parameters=embedding + shape.layers * layer)


def _shape_of_file(config: TrainingConfig) -> ModelShape:
    """Return the sizes of a file's model, which only transformers knows."""
    from utils.models.building import count_parameters

    model_config = build_model_config(config.model, config.model_overrides)
    counts = count_parameters(model_config)
    return ModelShape.of(model_config, counts.total, counts.embedding)


def _needed_bytes(
    config: TrainingConfig, precision: str, device: str, checkpointing: bool, micro_batch: int
) -> int:
    samples, _ = config.resolve_batch(1)
    shape = _shape(config)
    return estimate_training_memory(
        shape,
        StepSetup(
            micro_batch=micro_batch,
            sequence_length=config.sequence_length,
            precision=precision,
            gradient_checkpointing=config.gradient_checkpointing_policy if checkpointing else "",
            accumulation=max(1, samples // micro_batch),
            device=device,
            is_loss_chunked=is_loss_chunked(shape.kind, config.loss_implementation),
        ),
    ).total


def describe_forecast(forecast: Forecast) -> str:
    """Return a forecast as a line."""
    need = format_bytes(forecast.needed_bytes)
    text = f"needs about {need}, {format_bytes(forecast.available_bytes)} free: "
    if forecast.settings and forecast.fits:
        text += f"fits with {' and '.join(forecast.settings)}"
    else:
        text += "fits" if forecast.fits else "does not fit"
    if forecast.fits and forecast.seconds is not None:
        text += f"; {forecast.max_steps:,} steps take about {format_long(forecast.seconds)}"
    return text


def format_long(seconds: float) -> str:
    """Return a duration in its greatest unit."""
    for unit, size in (
        ("years", 365.25 * 86400),
        ("days", 86400),
        ("hours", 3600),
        ("minutes", 60),
    ):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"


def find_forecast_findings(forecasts: list[Forecast], *, on_gpu: bool) -> list[Finding]:
    """Return what to set, or that a configuration cannot run here."""
    findings = []
    for forecast in forecasts:
        name = f"--config {forecast.configuration}"
        if not forecast.fits:
            message = (
                f"{name} ({forecast.model}) does not fit: about "
                f"{format_bytes(forecast.needed_bytes)} needed, "
                f"{format_bytes(forecast.available_bytes)} free."
            )
            level = PROBLEM if forecast.configuration == "test" else NOTE
            advice = "A device with more memory, or a smaller model (--set model_overrides....)."
            findings.append(Finding(level, message, advice))
        elif forecast.settings:
            words = " ".join(f"--set {setting}" for setting in forecast.settings)
            message = f"{name} fits with less kept for the backward pass."
            findings.append(
                Finding(NOTE, message, f"{words} (keep the step with global_batch_size)")
            )
        elif on_gpu and forecast.needed_bytes > NEARLY_FULL * forecast.available_bytes:
            message = f"{name} fits, and leaves little room: fragments can fill it."
            findings.append(
                Finding(NOTE, message, "export PYTORCH_ALLOC_CONF=expandable_segments:True")
            )
    return findings
