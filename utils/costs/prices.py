"""What machines and buckets cost by the hour and the month: `configs/prices/*.json`.

    configs/prices/PROVIDER.json, hourly_price, machine_type -> dollars an hour of a run

The files hold dated list prices and are meant to be edited. A provider is a file, so a user's own
`configs/prices/mine.json` gives machines `mine/NAME`. Nothing is fetched. No torch here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.training_config import CONFIG_DIRECTORY, TrainingConfig
from utils.base.errors import ConfigError
from utils.base.files import read_regular_file
from utils.base.text import number, parse_json, printable

PRICE_DIRECTORY = CONFIG_DIRECTORY / "prices"
SPOT_SUFFIXES = (":spot", "-spot")
CURRENCY = "USD"
GIGABYTE = 2**30  # what Google Cloud Storage and S3 bill as a GB
MAX_PRICE = 1e9
MAX_LIST_BYTES = 2**20

_TEXT_KEYS = ("provider", "currency", "date", "source", "note")
_PRICE_KEYS = ("storage_gb_month", "egress_gb")
_MACHINE_KEYS = ("gpu", "gpus", "hourly", "spot_hourly", "date", "note")


@dataclass(frozen=True)
class PricedMachine:
    """One kind of machine.

    Attributes:
        gpu: Its GPU, empty for a machine without.
        gpus: How many.
        hourly: Dollars an hour.
        spot_hourly: Dollars an hour as a spot or preemptible machine, None where unknown.
        date: When this was its price.
    """

    gpu: str
    gpus: int
    hourly: float
    spot_hourly: float | None
    date: str


@dataclass(frozen=True)
class PriceList:
    """The prices of one provider.

    Attributes:
        provider: The name of its file.
        date: When the list was put together.
        source: Where its figures are published.
        machines: Name -> machine.
        storage_gb_month: Dollars for a GB kept for a month; None where unknown.
        egress_gb: Dollars for a GB that leaves the provider; None where unknown.
        operations: Kind of request -> dollars for a thousand of them.
    """

    provider: str
    date: str
    source: str
    machines: dict[str, PricedMachine]
    storage_gb_month: float | None
    egress_gb: float | None
    operations: dict[str, float]

    def storage_dollars_a_month(self, num_bytes: float) -> float | None:
        """Return what keeping so many bytes for a month costs; None where that is unknown."""
        price = self.storage_gb_month
        return None if price is None else price * num_bytes / GIGABYTE

    def egress_dollars(self, num_bytes: float) -> float | None:
        """Return what sending so many bytes elsewhere costs; None where that is unknown."""
        return None if self.egress_gb is None else self.egress_gb * num_bytes / GIGABYTE


@dataclass(frozen=True)
class HourlyPrice:
    """What all machines of a run cost together.

    Attributes:
        dollars: An hour.
        origin: Where that is from, for people.
        gpus: Of all those machines; 0 where that is not known.
    """

    dollars: float
    origin: str
    gpus: int = 0


def find_price(
    config: TrainingConfig, world_size: int, directory: Path = PRICE_DIRECTORY
) -> HourlyPrice | None:
    """Return the price of a run: `hourly_price`, else that of its machines; None for neither.

    The number of machines is that of the ranks, divided by the GPUs of one and rounded up.

    Raises:
        ConfigError: `machine_type` is in no price list, or its list cannot be used.
    """
    if config.hourly_price is not None:
        return HourlyPrice(config.hourly_price, "hourly_price")
    if not config.machine_type:
        return None
    name, is_spot = _split_spot(config.machine_type)
    prices, machine = _find_machine(name, directory)
    price = machine.spot_hourly if is_spot else machine.hourly
    if price is None:
        raise ConfigError(
            f"machine_type {printable(config.machine_type)}: "
            f"{_show(directory / prices.provider)}.json has no spot_hourly for it. Add it there, "
            "or set hourly_price."
        )
    count = max(1, math.ceil(world_size / machine.gpus)) if machine.gpus else 1
    kind = "spot price" if is_spot else "list price"
    origin = f"{count} x {printable(name)}, {kind} of {machine.date}"
    return HourlyPrice(count * price, origin, count * machine.gpus)


def find_hourly_price(
    config: TrainingConfig, world_size: int, directory: Path = PRICE_DIRECTORY
) -> float | None:
    """Return the dollars an hour of a run, None where they are not known.

    Raises:
        ConfigError: As `find_price`.
    """
    price = find_price(config, world_size, directory)
    return None if price is None else price.dollars


def find_bucket_prices(uri: str, directory: Path = PRICE_DIRECTORY) -> PriceList | None:
    """Return the price list of the provider that keeps a bucket; None for a directory.

    Raises:
        ConfigError: The list cannot be used.
    """
    path = directory / "gcp.json"
    return read_price_list(path) if uri.startswith("gs://") and path.is_file() else None


def read_price_list(path: Path) -> PriceList:
    """Return the prices of a file.

    Raises:
        ConfigError: It cannot be read, or a value is wrong; the message names file and key.
    """
    where = _show(path)
    try:
        values = parse_json(read_regular_file(path, MAX_LIST_BYTES))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{where}: cannot be read: {printable(exc)}.") from exc
    values = _require_object(where, values, (*_TEXT_KEYS, *_PRICE_KEYS, "operations", "machines"))
    for key in _TEXT_KEYS:
        _require_text(where, values, key)
    if values["currency"] != CURRENCY:
        raise ConfigError(
            f"{where}: currency must be {CURRENCY}, got {printable(values['currency'])}: all "
            "amounts are in dollars."
        )
    operations = values.get("operations", {})
    if not isinstance(operations, dict):
        raise ConfigError(f"{where}: operations must be an object.")
    machines = values.get("machines")
    if not isinstance(machines, dict) or not machines:
        raise ConfigError(f"{where}: machines must be an object that holds at least one.")
    return PriceList(
        provider=path.stem,
        date=printable(values["date"]),
        source=printable(values["source"]),
        machines={name: _read_machine(where, name, value) for name, value in machines.items()},
        storage_gb_month=_optional_price(where, values, "storage_gb_month"),
        egress_gb=_optional_price(where, values, "egress_gb"),
        operations={
            str(key): _require_price(f"{where}: operations", operations, key) for key in operations
        },
    )


def _read_machine(where: str, name: str, value: object) -> PricedMachine:
    where = f"{where}: machines.{printable(name)}"
    values = _require_object(where, value, _MACHINE_KEYS)
    gpus = values.get("gpus")
    if type(gpus) is not int or not 0 <= gpus <= 1024:
        raise ConfigError(
            f"{where}: gpus must be a whole number, 0 to 1024, got {printable(gpus)}."
        )
    return PricedMachine(
        gpu=str(values.get("gpu", "")),
        gpus=gpus,
        hourly=_require_price(where, values, "hourly"),
        spot_hourly=_optional_price(where, values, "spot_hourly"),
        date=_require_text(where, values, "date"),
    )


def _require_object(where: str, value: object, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a JSON object.")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(keys)}."
            raise ConfigError(f"{where}: unknown key {printable(key)!r}. {hint}")
    return value


def _require_text(where: str, values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {key} must be a text, got {printable(value)}.")
    return printable(value)


def _require_price(where: str, values: Mapping[str, Any], key: str) -> float:
    price = number(values.get(key))
    if price is None or not 0 <= price <= MAX_PRICE:
        raise ConfigError(
            f"{where}: {printable(key)} must be dollars, 0 or more, got "
            f"{printable(values.get(key))}."
        )
    return price


def _optional_price(where: str, values: Mapping[str, Any], key: str) -> float | None:
    return None if values.get(key) is None else _require_price(where, values, key)


def _split_spot(machine_type: str) -> tuple[str, bool]:
    for suffix in SPOT_SUFFIXES:
        if machine_type.endswith(suffix):
            return machine_type.removesuffix(suffix), True
    return machine_type, False


def _find_machine(name: str, directory: Path) -> tuple[PriceList, PricedMachine]:
    """Return the list and the machine of a `PROVIDER/MACHINE`."""
    # Looked up among the files that are there: the name is never made part of a path.
    files = {path.stem: path for path in sorted(directory.glob("*.json"))}
    provider, _, machine = name.partition("/")
    if provider in files:
        prices = read_price_list(files[provider])
        if machine in prices.machines:
            return prices, prices.machines[machine]
        known = [f"{provider}/{known}" for known in prices.machines]
    else:
        known = [known for path in files.values() for known in _list_machines(path)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}?" if near else f"Providers: {', '.join(files) or 'none'}."
    raise ConfigError(
        f"machine_type {printable(name)} is in no list of {_show(directory)}. {hint} Or set "
        "hourly_price."
    )


def _list_machines(path: Path) -> list[str]:
    try:
        return [f"{path.stem}/{name}" for name in read_price_list(path).machines]
    except ConfigError:  # it is not the one that was asked for
        return []


def _show(path: Path) -> str:
    root = CONFIG_DIRECTORY.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
