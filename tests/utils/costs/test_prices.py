"""Price lists: the shipped ones can be read, wrong ones are one error, machines are counted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from configs.training_config import TrainingConfig, get_training_config
from utils.base.errors import ConfigError
from utils.costs.prices import (
    GIGABYTE,
    PRICE_DIRECTORY,
    find_bucket_prices,
    find_hourly_price,
    find_price,
    read_price_list,
)


def price_list(**changes: Any) -> dict[str, Any]:
    values = {
        "provider": "mine",
        "currency": "USD",
        "date": "2026-01-31",
        "source": "https://example.com/prices",
        "note": "list prices",
        "storage_gb_month": 0.02,
        "egress_gb": 0.1,
        "operations": {"write_per_1000": 0.005},
        "machines": {
            "box-8": {
                "gpu": "H100",
                "gpus": 8,
                "hourly": 80.0,
                "spot_hourly": 30.0,
                "date": "2026-01-30",
            },
            "cpu": {"gpu": "", "gpus": 0, "hourly": 0.5, "date": "2026-01-30"},
        },
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


def write(directory: Path, values: object, name: str = "mine") -> Path:
    path = directory / f"{name}.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return path


@pytest.mark.parametrize("path", sorted(PRICE_DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_list_is_dated_and_says_where_it_is_from(path: Path) -> None:
    prices = read_price_list(path)
    values = json.loads(path.read_text("utf-8"))
    assert values["provider"] == path.stem
    assert prices.source.startswith("https://")
    assert "List prices" in values["note"]
    for name, machine in prices.machines.items():
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", machine.date), name
        assert 0.1 < machine.hourly / max(1, machine.gpus) < 20, name
        assert machine.spot_hourly is None or machine.spot_hourly < machine.hourly, name


def test_the_shipped_lists_are_the_five_providers() -> None:
    assert {path.stem for path in PRICE_DIRECTORY.glob("*.json")} == {
        "gcp",
        "aws",
        "lambda",
        "runpod",
        "modal",
    }


@pytest.mark.parametrize(
    ("machine_type", "world_size", "dollars"),
    [
        ("mine/box-8", 1, 80.0),
        ("mine/box-8", 8, 80.0),
        ("mine/box-8", 9, 160.0),
        ("mine/box-8", 16, 160.0),
        ("mine/box-8:spot", 16, 60.0),
        ("mine/box-8-spot", 8, 30.0),
        ("mine/cpu", 4, 0.5),
        ("", 4, None),
    ],
)
def test_machines_are_counted_from_ranks(
    tmp_path: Path, machine_type: str, world_size: int, dollars: float | None
) -> None:
    write(tmp_path, price_list())
    config = TrainingConfig(machine_type=machine_type)
    assert find_hourly_price(config, world_size, tmp_path) == dollars


def test_the_users_own_price_decides() -> None:
    config = TrainingConfig(machine_type="no/such", hourly_price=2.5)
    assert find_hourly_price(config, 8) == 2.5


def test_a_file_that_is_none_is_one_error_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "aaa.json")
    write(tmp_path, price_list())
    with pytest.raises(ConfigError, match="no regular file"):
        read_price_list(tmp_path / "aaa.json")
    with pytest.raises(ConfigError, match="in no list"):
        find_price(TrainingConfig(machine_type="other/box"), 1, tmp_path)


def test_what_a_list_says_does_not_steer_a_terminal(tmp_path: Path) -> None:
    machine = {"gpu": "H100", "gpus": 1, "hourly": 1.0, "date": "\x1b[31mRED\x07"}
    write(tmp_path, price_list(machines={"box\x1b[2J": machine}))
    price = find_price(TrainingConfig(machine_type="mine/box\x1b[2J"), 1, tmp_path)
    assert price is not None
    assert price.origin.isprintable()


def test_a_price_says_where_it_is_from(tmp_path: Path) -> None:
    write(tmp_path, price_list())
    price = find_price(TrainingConfig(machine_type="mine/box-8:spot"), 9, tmp_path)
    assert price is not None
    assert price.origin == "2 x mine/box-8, spot price of 2026-01-30"


@pytest.mark.parametrize(
    ("machine_type", "hint"),
    [
        ("gcp/a2-highgpu-9g", r"Did you mean gcp/a2-highgpu-\dg\?"),
        ("gpc/a2-highgpu-8g", r"Did you mean gcp/a2-highgpu-8g\?"),
        ("zzzz", "Providers: aws, gcp, lambda, modal, runpod"),
        ("../test/x", "is in no list"),
        ("gcp/a2-highgpu-8g:spot", "no spot_hourly"),
        ("\x1b]0;owned\x07/x", "is in no list"),
    ],
)
def test_an_unknown_machine_names_the_nearest(machine_type: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        find_hourly_price(TrainingConfig(machine_type=machine_type), 1)
    assert str(caught.value).isprintable()


DAMAGED = [
    ("{", "cannot be read"),
    ("[]", "must be a JSON object"),
    ("[" * 100_000, "cannot be read"),
    (price_list(currency="EUR"), "currency must be USD, got EUR"),
    (price_list(date=...), "date must be a text"),
    (price_list(source=3), "source must be a text"),
    (price_list(machines={}), "machines must be an object"),
    (price_list(machines=[1]), "machines must be an object"),
    (price_list(storage_gb_month=-1), "storage_gb_month must be dollars, 0 or more, got -1"),
    (price_list(egress_gb="1"), "egress_gb must be dollars"),
    (price_list(egress_gb=True), "egress_gb must be dollars"),
    (price_list(operations={"write": float("nan")}), "operations: write must be dollars"),
    (price_list(operations=[]), "operations must be an object"),
    (price_list(storage_gb_months=1), "Did you mean storage_gb_month?"),
    (price_list(machines={"a": 3}), r"machines.a: must be a JSON object"),
    (price_list(machines={"a": {"gpus": 1, "date": "d"}}), r"machines.a: hourly must be dollars"),
    (price_list(machines={"a": {"gpus": 1, "hourly": 1}}), r"machines.a: date must be a text"),
    (
        price_list(machines={"a": {"gpus": 1.5, "hourly": 1, "date": "d"}}),
        r"machines.a: gpus must be a whole number",
    ),
    (
        price_list(machines={"\x1b[2J": {"gpus": 1, "hourly": 10**400, "date": "d"}}),
        "hourly must be dollars",
    ),
]


@pytest.mark.parametrize(("values", "message"), DAMAGED)
def test_a_wrong_list_is_one_error_that_names_file_and_key(
    tmp_path: Path, values: object, message: str
) -> None:
    path = write(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        read_price_list(path)
    text = str(caught.value)
    assert "mine.json" in text
    assert message in text
    assert text.isprintable()


def test_another_providers_wrong_list_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path, price_list())
    write(tmp_path, "{", "broken")
    assert find_hourly_price(TrainingConfig(machine_type="mine/cpu"), 1, tmp_path) == 0.5
    with pytest.raises(ConfigError, match="Did you mean mine/cpu?"):
        find_hourly_price(TrainingConfig(machine_type="mime/cpu"), 1, tmp_path)


def test_buckets_are_kept_by_the_gb_and_the_month(tmp_path: Path) -> None:
    prices = find_bucket_prices("gs://runs/a")
    assert prices is not None
    assert prices.storage_dollars_a_month(100 * GIGABYTE) == pytest.approx(2.0)
    assert prices.egress_dollars(10 * GIGABYTE) == pytest.approx(1.2)
    assert find_bucket_prices("/mnt/bucket") is None
    without = read_price_list(write(tmp_path, price_list(storage_gb_month=..., egress_gb=...)))
    assert without.storage_dollars_a_month(1) is None
    assert without.egress_dollars(1) is None


@pytest.mark.parametrize("price", [-1, float("nan"), float("inf"), "cheap", True])
def test_an_hourly_price_is_zero_or_more(price: object) -> None:
    with pytest.raises(ConfigError, match="hourly_price"):
        get_training_config("test", {"hourly_price": price})
