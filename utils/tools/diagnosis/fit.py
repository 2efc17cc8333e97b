"""Which configurations fit this machine, and roughly how long they take: pure functions.

    configs/*.json, memory of a device, its measured speed -> Forecast -> findings, text

Memory is that of utils/models/estimates.py, time is FLOPs over the speed of the small model's step,
which a larger model on a GPU often exceeds. `train.py --dry-run` says more. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from configs.model_config import build_model_config, is_model_file
from configs.training_config import TrainingConfig, get_training_config
from utils.base.text import format_bytes, format_duration
from utils.costs.scaling import shape_of_preset
from utils.models.estimates import ModelShape, StepSetup, estimate_training_memory
from utils.models.mfu import flops_per_token
from utils.tools.diagnosis.facts import Facts, ask
from utils.tools.diagnosis.findings import NOTE, PROBLEM, Diagnosis

CONFIGURATIONS = ("test", "production")
USABLE_SHARE = 0.95
LESS_MEMORY = "gradient_checkpointing=true", "per_device_train_batch_size=1"


@dataclass(frozen=True)
class Forecast:
    """What a configuration needs on one device.

    Attributes:
        needed_bytes: Estimated.
        seconds: For all of its steps on this one device, None where no speed is known.
    """

    configuration: str
    model: str
    max_steps: int
    needed_bytes: int
    available_bytes: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether there is memory enough."""
        return self.needed_bytes <= self.available_bytes * USABLE_SHARE


def find_forecasts(facts: Facts) -> list[Forecast]:
    """Return which configurations fit the device that train.py takes."""
    if facts.torch.version is None:
        return []
    found = (ask(partial(forecast_run, name, facts)) for name in CONFIGURATIONS)
    return [forecast for forecast in found if forecast is not None]


def forecast_run(name: str, facts: Facts, config: TrainingConfig | None = None) -> Forecast:
    """Return whether a configuration fits the device that train.py takes, and how long it runs."""
    config = config or get_training_config(name)
    torch, available, precision = facts.torch, facts.host.memory_available_bytes or 0, "no"
    if torch.gpus:
        available = torch.gpus[0].memory_free_bytes or torch.gpus[0].memory_bytes
        precision = torch.gpus[0].precision
    rates = (timing.step_tflops for timing in facts.timings if timing.device == torch.device)
    tflops = next(rates, None)
    shape, (samples, accumulation) = _find_shape(config), config.resolve_batch(1)
    device = torch.device.partition(":")[0]
    setup = StepSetup.of(config, shape.kind, precision, device, accumulation)
    needed = estimate_training_memory(shape, setup).total
    length = config.sequence_length
    each = flops_per_token(shape.parameters, shape.layers, shape.attention_width, length)
    flops = each * samples * length * config.max_steps
    return Forecast(
        configuration=name,
        model=config.model,
        max_steps=config.max_steps,
        needed_bytes=needed,
        available_bytes=available,
        seconds=flops / tflops / 1e12 if tflops else None,
    )


def _find_shape(config: TrainingConfig) -> ModelShape:
    """Return the sizes of a model; one that is no preset as it is has to be built."""
    if not config.model_overrides and not is_model_file(config.model):
        return shape_of_preset(config.model)
    from utils.models.building import count_parameters

    model_config = build_model_config(config.model, config.model_overrides)
    counts = count_parameters(model_config)
    return ModelShape.of(model_config, counts.total, counts.embedding)


def describe_forecast(forecast: Forecast) -> str:
    """Return whether it fits, and how long it takes."""
    if not forecast.fits:
        return "does not fit"
    if forecast.seconds is None:
        return "fits"
    return f"fits; {forecast.max_steps:,} steps take about {format_duration(forecast.seconds)}"


def find_misfits(forecasts: list[Forecast]) -> Iterator[Diagnosis]:
    """Yield what to set, or that a configuration cannot run here."""
    for forecast in forecasts:
        name = f"--config {forecast.configuration}"
        if not forecast.fits:
            need, free = map(format_bytes, (forecast.needed_bytes, forecast.available_bytes))
            message = f"{name} ({forecast.model}) does not fit: about {need} needed, {free} free."
            level = PROBLEM if forecast.configuration == "test" else NOTE
            words = " ".join(f"--set {setting}" for setting in LESS_MEMORY)
            advice = f"{words} take less memory; train.py --dry-run says how much is needed."
            yield Diagnosis(level, message, advice)
