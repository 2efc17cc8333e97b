"""Facts from fake /sys and /dev trees, from a fake NVML, from torch as it is; parts apart."""

from __future__ import annotations

import multiprocessing
import os
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from utils.tools.diagnosis.facts import Broken, DriverGpu, read_driver, read_host, run_apart

GIB = 2**30


# Parts in a process of their own


def tell_one_and_fail() -> Iterator[Any]:
    yield 1
    raise RuntimeError("no more\nlines")


def tell_nothing_and_hang() -> Iterator[Any]:
    signal.pause()
    yield


def test_part_that_fails_has_told_what_it_knew() -> None:
    first, broken = run_apart(tell_one_and_fail, limit_seconds=60)
    assert (first, broken) == (1, Broken("RuntimeError: no more"))


def test_part_that_hangs_is_ended() -> None:
    assert list(run_apart(tell_nothing_and_hang, limit_seconds=1)) == [
        Broken("no answer within 1 s")
    ]
    assert multiprocessing.active_children() == []


# The operating system


def write_tree(root: Path, *files: tuple[str, str]) -> None:
    for name, text in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_host_has_its_gpus_and_device_files_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, drivers = "sys/bus/pci/devices", tmp_path / "sys/bus/pci/drivers/nouveau"
    for address, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),  # its sound
        ("0000:02:00.0", "0x10de", "0x030000"),
        ("0000:03:00.0", "0x1002", "0x030000"),
    ):
        device = f"{bus}/{address}"
        write_tree(tmp_path, (f"{device}/vendor", f"{vendor}\n"), (f"{device}/class", f"{kind}\n"))
    drivers.mkdir(parents=True)
    (tmp_path / bus / "0000:01:00.0/driver").symlink_to(drivers)
    write_tree(tmp_path, ("dev/nvidia0", ""), ("dev/nvidiactl", ""), ("dev/null", ""))
    write_tree(tmp_path, (".dockerenv", ""))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "nvidia0")
    host = read_host(tmp_path, {"CUDA_VISIBLE_DEVICES": "0", "AWS_SECRET_ACCESS_KEY": "x"})
    assert host.pci_gpus == {"0000:01:00.0": "nouveau", "0000:02:00.0": None}
    assert host.device_files == {"/dev/nvidia0": False, "/dev/nvidiactl": True}
    assert host.environment == {"CUDA_VISIBLE_DEVICES": "0"}
    assert host.is_container


# The driver


class FakeNvml:
    """NVML with the answers of one machine; what is not among them is "not supported"."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def nvmlInit(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def answer(*args: object) -> Any:
            value = self.answers.get(name)
            value = value(*args) if callable(value) else value
            if value is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value

        return answer


def test_driver_answers_what_it_can_and_the_rest_is_none() -> None:
    process = types.SimpleNamespace(pid=2**30, usedGpuMemory=GIB)
    nvml = FakeNvml(
        nvmlSystemGetDriverVersion="580.65.06",
        nvmlSystemGetCudaDriverVersion=12040,
        nvmlDeviceGetCount=1,
        nvmlDeviceGetHandleByIndex=lambda index: f"handle {index}",
        nvmlDeviceGetName="NVIDIA H200",
        nvmlDeviceGetMemoryInfo=types.SimpleNamespace(total=140 * GIB, used=GIB),
        nvmlDeviceGetComputeRunningProcesses=[process],
    )
    driver = read_driver(nvml)
    assert (driver.version, driver.cuda_version, driver.num_gpus) == ("580.65.06", (12, 4), 1)
    assert driver.problem is None
    assert driver.gpus == [DriverGpu(0, "NVIDIA H200", None, 140 * GIB, GIB, [f"process {2**30}"])]


def test_gpu_that_is_lost_hides_no_other() -> None:
    nvml = FakeNvml(nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=lambda index: index or None)
    driver = read_driver(nvml)
    assert [gpu.index for gpu in driver.gpus] == [1]
    assert driver.problem == "1 of 2 GPUs do not answer"


def test_driver_that_cannot_be_opened_has_a_problem() -> None:
    def refuse() -> None:
        raise OSError("no file")

    assert read_driver(types.SimpleNamespace(nvmlInit=refuse)).problem == "no file"
