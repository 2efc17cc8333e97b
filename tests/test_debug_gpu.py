"""The whole command: on this machine, with a broken torch, with facts of another machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import debug_gpu
from configs.config_files import PROJECT_DIRECTORY
from tests.processes import run_python
from utils.tools.diagnosis.facts import (
    Broken,
    Driver,
    DriverGpu,
    Facts,
    Host,
    Timing,
    Torch,
    TorchGpu,
)
from utils.tools.diagnosis.findings import Diagnosis, find_causes
from utils.tools.diagnosis.fit import find_forecasts
from utils.tools.diagnosis.text import print_diagnoses, print_page

SCRIPT = PROJECT_DIRECTORY / "debug_gpu.py"
GIB = 2**30
TIMING = Timing("cuda:0", "bf16", 84_000_000, 0.01, 819_200.0, 400.0)
DRIVER_GPU = DriverGpu(0, "NVIDIA H200", (9, 0), 140 * GIB, GIB, ["python 42"])
TORCH_GPU = TorchGpu(0, "NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), "bf16")
FACTS = Facts(
    Host(system="Linux", pci_gpus={"0:1": None}, device_files={"/dev/nvidia0": True}),
    Driver("/bin/nvidia-smi", "580.65.06", (13, 0), 1, [DRIVER_GPU]),
    Torch("2.13.0", "13.0", is_cuda_available=True, gpus=[TORCH_GPU], architectures=["sm_90"]),
    [TIMING],
)


def test_crash_while_timing_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_apart(part: Any, *args: Any, limit_seconds: float) -> Iterator[Any]:
        yield Driver() if part is debug_gpu.examine_driver else FACTS.torch
        if part is debug_gpu.examine_torch:
            yield TIMING
            yield Broken("it ended by SIGILL")

    monkeypatch.setattr(debug_gpu, "run_apart", break_apart)
    facts = debug_gpu.gather_facts(is_quick=False, is_silent=True)
    assert (facts.torch, facts.timings) == (FACTS.torch, [TIMING])
    assert facts.interrupted == "it ended by SIGILL"


def test_page_shows_gpu_speed_and_fit(capsys: pytest.CaptureFixture[str]) -> None:
    print_page(FACTS, find_forecasts(FACTS), find_causes(FACTS))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "Driver 580.65.06",
        "CUDA up to 13.0",
        "PCI Bus 0:1 (driver: none)",
        "0 NVIDIA H200 9.0 140.0 GiB 1.0 GiB python 42",
        "Build CUDA 13.0",
        "0 NVIDIA H200 9.0 140.0 GiB 139.0 GiB bf16",
        "cuda:0 bf16 10 ms, 819,200 tokens/s, 400 TFLOP/s (84.0M parameters)",
        "[ok] torch can use 1 GPU(s) with CUDA 13.0.",
        "train.py can use 1 GPU(s) (NVIDIA H200) in bf16.",
    ):
        assert line in lines
    assert any(
        line.startswith("production refocused-1.2b 34.0 GiB 139.0 GiB fits") for line in lines
    )


def test_values_from_outside_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_diagnoses([Diagnosis("problem", "Broken\x07.", "Mend \x1b[2J it.")], "Done.")
    assert capsys.readouterr().out == (
        "Diagnosis\n  [problem] Broken?.\n      Mend ?[2J it.\n  Done.\n"
    )


@pytest.mark.slow
def test_this_machine_is_timed_and_diagnosed_with_exit_code_0(tmp_path: Path) -> None:
    result = run_python(SCRIPT, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("NVIDIA Driver", "nvidia-smi", "Build", "production", "Diagnosis", "Speed"):
        assert part in result.stdout
    assert " tokens/s, " in next(line for line in result.stdout.splitlines() if "float32" in line)
    assert "train.py " in result.stdout.splitlines()[-1]


def test_quick_leaves_the_timings_out() -> None:
    (facts,) = debug_gpu.examine_torch(is_quick=True)
    assert isinstance(facts, Torch)
    assert facts.version


def test_machine_without_a_working_torch_is_diagnosed_too(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    result = run_python(SCRIPT, "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    value = json.loads(result.stdout)
    assert value["torch"]["problem"] == "libtorch_cpu.so: cannot open"
    assert (value["timings"], value["forecasts"]) == ([], [])
    assert value["findings"][0]["advice"] == "Run: bash setup.sh"
    assert value["verdict"] == "train.py cannot run: torch does not work."
    assert value["host"]["cpu_threads"] >= 1


def test_torch_that_dies_of_a_signal_is_diagnosed_too(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    result = run_python(SCRIPT, "--quick", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    assert "torch cannot be imported: it ended by SIGILL." in result.stdout
