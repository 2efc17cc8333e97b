"""The tables of docs/CLOUD.md: what runs of one rented GPU take, by formula and by list prices.

    presets, GPUs -> utils/costs/scaling.py -> time;  configs/prices/*.json -> dollars -> rows of
    text

Written and compared as those of docs/SCALING.md are (utils/costs/scaling_tables.py). Nothing here
was measured. No torch here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from utils.base.errors import ConfigError
from utils.costs.gpu_types import GIB, GPU_TYPES, GpuType
from utils.costs.prices import PRICE_DIRECTORY, read_price_list
from utils.costs.scaling import TrainingJob, best_plan, shape_of_preset
from utils.costs.scaling_run import TOKENS_PER_PARAMETER
from utils.costs.scaling_tables import Table, format_time
from utils.models.estimates import estimate_checkpoint_bytes

PROVIDERS = ("aws", "gcp", "lambda", "modal", "runpod")
"""Lists that come with the project; a user's own would change the page."""

A10G = GpuType("A10G", 22 * GIB, 0.6e12, 10e9, 5e9, 8, 0.5, 0.0, "")
"""The data sheet's 24 GB and 600 GB/s, the efficiency of the L4; what plans on many GPUs lack."""

GPUS: dict[str, tuple[GpuType, tuple[str, ...]]] = {
    "T4": (GPU_TYPES["T4"], ("T4",)),
    "L4": (GPU_TYPES["L4"], ("L4",)),
    "A10G": (A10G, ("A10G", "modal/A10")),
    "A100 80GB": (GPU_TYPES["A100"], ("A100 80GB", "A100 80GB SXM", "A100 80GB PCIe")),
    "H100": (GPU_TYPES["H100"], ("H100", "H100 SXM")),
}
"""Each GPU with its names in the price lists; Modal sells the A10G as A10, others another one."""


@dataclass(frozen=True)
class RentedRun:
    """A run of the page.

    Attributes:
        model: Preset.
        label: How the page calls it.
        global_batch: Samples in a step.
        sequence_length: Tokens in a sample.
        steps: Of the run; None for 20 tokens a parameter.
    """

    model: str
    label: str
    global_batch: int
    sequence_length: int
    steps: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        if self.steps is None:
            return int(TOKENS_PER_PARAMETER * shape_of_preset(self.model).parameters)
        return self.steps * self.global_batch * self.sequence_length


RUNS = (
    RentedRun("tinystories", "`--config tinystories`", 32, 1024, 100_000),
    RentedRun("gpt2", "`gpt2`", 512, 1024),
    RentedRun("llama-138m", "`llama-138m`", 64, 1024),
    RentedRun("refocused-1.2b", "`--config production`, 5,000 steps", 4, 2048, 5_000),
    RentedRun("refocused-1.2b", "`refocused-1.2b`", 256, 2048),
)


def find_runs() -> list[RentedRun]:
    """Return the runs whose preset there is."""
    found = []
    for run in RUNS:
        with contextlib.suppress(ConfigError):
            shape_of_preset(run.model)
            found.append(run)
    return found


def find_prices(names: tuple[str, ...], provider: str) -> list[float]:
    """Return the hourly dollars of a provider's machines with one such GPU, none of them spot."""
    machines = read_price_list(PRICE_DIRECTORY / f"{provider}.json").machines.values()
    alone = [one for one in machines if one.gpus == 1]
    return sorted(one.hourly for one in alone if {one.gpu, f"{provider}/{one.gpu}"} & set(names))


def prices_table() -> Table:
    """What an hour of a machine with one GPU costs."""
    rows: Table = [["GPU", "memory GiB", "peak TFLOPS", *PROVIDERS]]
    for label, (gpu, names) in GPUS.items():
        found = [find_prices(names, provider) for provider in PROVIDERS]
        cells = [f"${_span(prices, 2)}" if prices else "-" for prices in found]
        memory, peak = f"{gpu.memory_bytes / GIB:.0f}", f"{gpu.peak_flops / 1e12:.0f}"
        rows.append([label, memory, peak, *cells])
    return rows


def rented_table() -> Table:
    """Time and dollars of each run on one GPU."""
    rows: Table = [["run", "parameters", "tokens", "checkpoint GB", *GPUS]]
    for run in find_runs():
        parameters = shape_of_preset(run.model).parameters
        rows.append(
            [
                run.label,
                f"{parameters / 1e6:,.0f} M",
                f"{run.tokens / 1e9:.2g} B",
                f"{estimate_checkpoint_bytes(parameters) / 1e9:.1f}",
                *(_cell(run, *found) for found in GPUS.values()),
            ]
        )
    return rows


def _cell(run: RentedRun, gpu: GpuType, names: tuple[str, ...]) -> str:
    shape = shape_of_preset(run.model)
    plan = best_plan(TrainingJob(shape, gpu, 1, "ddp", run.global_batch, run.sequence_length))
    if plan is None:
        return "does not fit"
    seconds = run.tokens / plan.tokens_per_second
    hourly = [price for provider in PROVIDERS for price in find_prices(names, provider)]
    dollars = [seconds / 3600 * price for price in (min(hourly), max(hourly))]
    return f"{format_time(seconds)}, ${_span(dollars, 0 if dollars[0] >= 10 else 1)}"


def _span(values: list[float], digits: int) -> str:
    """Return the smallest and the largest of sorted values; once where they look the same."""
    low, high = (f"{value:,.{digits}f}" for value in (values[0], values[-1]))
    return low if low == high else f"{low}-{high}"


CLOUD_TABLES: dict[str, Callable[[], Table]] = {"prices": prices_table, "rented": rented_table}
