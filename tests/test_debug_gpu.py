"""The whole command: on this machine, with a broken torch, with facts of another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import debug_gpu
from configs.training_config import PROJECT_DIRECTORY
from debug_gpu import Facts, find_forecasts, judge, print_findings, print_section, verdict
from utils.tools.diagnosis.device_timing import Matmul, Timing, TrainingStep
from utils.tools.diagnosis.diagnosis import Broken, Finding, run_apart
from utils.tools.diagnosis.driver_facts import Driver, DriverGpu, GpuProcess, Link
from utils.tools.diagnosis.gpu_text import (
    driver_gpu_rows,
    driver_rows,
    forecast_rows,
    gpu_lines,
    host_rows,
    matmul_text,
    step_text,
    timing_rows,
    torch_rows,
)
from utils.tools.diagnosis.host_facts import Host, PciGpu
from utils.tools.diagnosis.torch_facts import Torch, TorchGpu

SCRIPT = PROJECT_DIRECTORY / "debug_gpu.py"
GIB = 2**30
H200 = TorchGpu(
    0,
    "NVIDIA H200",
    140 * GIB,
    (9, 0),
    True,
    True,
    True,
    True,
    memory_free_bytes=139 * GIB,
    uuid="GPU-1",
    num_processors=132,
    attention=["flash", "math"],
)
TIMING = Timing(
    "cuda:0",
    [Matmul("cuda:0", "bfloat16", 4096, 0.2, 687.2, 0.69)],
    TrainingStep("cuda:0", "bf16", 84_000_000, 8192, 10.0, 819_200.0, 400.0, 0.4),
    {"throttle_reasons": ["too hot"], "temperature_celsius": 90},
)
DRIVER_GPU = DriverGpu(
    0,
    "NVIDIA H200",
    "GPU-1",
    (9, 0),
    140 * GIB,
    GIB,
    [GpuProcess(42, "python", GIB)],
    compute_mode="exclusive process",
    is_ecc_enabled=True,
    ecc_errors=0,
    temperature_celsius=35,
    power_watts=80.0,
    power_limit_watts=700.0,
    clock_mhz=345,
    max_clock_mhz=1980,
    pcie_generation=1,
    max_pcie_generation=5,
    pcie_width=16,
    max_pcie_width=16,
    nvlinks=18,
)
FACTS = Facts(
    Host(system="Linux", device_files={"/dev/nvidia0": True}, memory_available_bytes=64 * GIB),
    Driver("/bin/nvidia-smi", "580.65.06", (13, 0), 1, [DRIVER_GPU], [Link(0, 1, "NVLink", True)]),
    Torch(
        version="2.13.0",
        cuda_build="13.0",
        is_cuda_available=True,
        gpus=[H200],
        nccl="2.28.3",
        architectures=["sm_90"],
        is_tf32_on=False,
    ),
    [TIMING],
)


def run_script(tmp_path: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# Parts in a process of their own


def tell_all() -> Iterator[Any]:
    yield 1
    yield "two"


def tell_one_and_fail() -> Iterator[Any]:
    yield 1
    raise RuntimeError("no more\nlines")


def tell_one_and_crash() -> Iterator[Any]:
    yield 1
    os.kill(os.getpid(), signal.SIGILL)


def tell_one_and_hang() -> Iterator[Any]:
    yield os.getpid()
    signal.pause()


def test_part_in_a_process_tells_all() -> None:
    assert list(run_apart(tell_all, limit_seconds=60)) == [1, "two"]


def test_part_that_fails_or_crashes_has_told_what_it_knew() -> None:
    first, broken = run_apart(tell_one_and_fail, limit_seconds=60)
    assert (first, broken) == (1, Broken("RuntimeError: no more"))
    first, broken = run_apart(tell_one_and_crash, limit_seconds=60)
    assert (first, broken) == (1, Broken("it ended by SIGILL"))


def test_part_that_hangs_is_ended() -> None:
    values = run_apart(tell_one_and_hang, limit_seconds=3)
    pid = next(values)
    assert next(values) == Broken("no answer within 3 s")
    values.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_crash_of_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_apart(part: Any, *args: Any, limit_seconds: float) -> Iterator[Any]:
        yield Broken("it ended by SIGILL")

    monkeypatch.setattr(debug_gpu, "run_apart", break_apart)
    facts = debug_gpu.gather_facts(is_quick=True, is_silent=True)
    assert facts.driver.problem == facts.torch.problem == "it ended by SIGILL"
    messages = [finding.message for finding in judge(facts, [])]
    assert "torch cannot be imported: it ended by SIGILL." in messages
    assert verdict(facts) == "train.py cannot run: torch does not work."


def test_crash_while_timing_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_apart(part: Any, *args: Any, limit_seconds: float) -> Iterator[Any]:
        yield Driver() if part is debug_gpu.examine_driver else FACTS.torch
        yield TIMING
        yield Broken("no answer within 240 s")

    monkeypatch.setattr(debug_gpu, "run_apart", break_apart)
    facts = debug_gpu.gather_facts(is_quick=False, is_silent=True)
    assert facts.timings == [TIMING]
    assert "Timing was cut short: no answer" in judge(facts, [])[0].message


# Judging


def test_problems_stand_first_and_load_is_judged() -> None:
    findings = judge(FACTS, find_forecasts(FACTS))
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, key=["problem", "note", "ok"].index)
    assert findings[0].message == "GPU 0: it is slowed at 90 C: too hot."
    assert Finding("ok", "torch can use 1 GPU(s) with CUDA 13.0.") in findings
    assert verdict(FACTS) == "train.py can use 1 GPU(s) (NVIDIA H200) in bf16."


def test_facts_that_cannot_be_judged_hide_no_others() -> None:
    host = replace(FACTS.host, shm_bytes="much")  # type: ignore[arg-type]
    messages = [finding.message for finding in judge(replace(FACTS, host=host), [])]
    assert "What was found of environment could not be judged." in messages
    assert "torch can use 1 GPU(s) with CUDA 13.0." in messages


def test_failed_timing_is_a_problem_with_advice() -> None:
    step = TrainingStep("cuda:0", "bf16", problem="CUDA out of memory")
    facts = replace(FACTS, timings=[replace(TIMING, step=step, moment={})])
    (first, *_) = judge(facts, [])
    assert first.message == "cuda:0: the training step failed: CUDA out of memory"
    assert "nvidia-smi names them" in first.advice


def test_configurations_are_held_against_the_device_that_is_used() -> None:
    test, production = find_forecasts(FACTS)
    assert production.available_bytes == 139 * GIB
    assert production.fits
    assert production.seconds
    on_cpu = find_forecasts(replace(FACTS, torch=Torch(version="2.13.0")))
    assert [forecast.available_bytes for forecast in on_cpu] == [64 * GIB, 64 * GIB]
    assert on_cpu[0].seconds is None  # nothing was timed on the CPU
    assert find_forecasts(replace(FACTS, torch=Torch(problem="broken"))) == []


# Text


def test_gpu_is_shown_with_what_it_can_do() -> None:
    assert gpu_lines(H200) == [
        "NVIDIA H200, 140.0 GiB, 139.0 GiB free, capability 9.0, 132 processors",
        "has bf16, fp16, fp8, TF32",
        "attention: flash, math",
    ]
    t4 = TorchGpu(0, "Tesla T4", 15 * GIB, (7, 5), False, True)
    assert gpu_lines(t4)[1] == "has fp16; no bf16, fp8, TF32"
    assert ("Build", "CUDA 13.0") in torch_rows(FACTS.torch)
    assert ("NCCL", "2.28.3") in torch_rows(FACTS.torch)
    assert torch_rows(Torch(problem="broken")) == [("Version", "none (broken)")]


def test_driver_is_shown_without_what_it_does_not_answer() -> None:
    assert driver_gpu_rows(FACTS.driver) == [
        ("GPU 0", "NVIDIA H200, 1.0 GiB of 140.0 GiB in use"),
        ("", "80 W of 700 W, 345 of 1980 MHz, 35 C"),
        ("", "PCIe generation 1 of 5, x16 of x16, 18 NVLinks"),
        ("", "ECC on, 0 uncorrected errors, compute mode exclusive process"),
        ("", "used by python 42, 1.0 GiB"),
        ("GPU 0-1", "NVLink, P2P"),
    ]
    assert driver_gpu_rows(Driver(gpus=[DriverGpu(3, "Old")])) == [("GPU 3", "Old")]
    host = replace(FACTS.host, pci_gpus=[PciGpu("0:1", "NVIDIA", None)], has_iommu=True)
    rows = dict(driver_rows(host, FACTS.driver))
    assert rows["PCI bus"] == "NVIDIA 0:1 (driver: none)"
    assert (rows["CUDA"], rows["IOMMU"], rows["Devices"]) == ("up to 13.0", "on", "/dev/nvidia0")


def test_host_is_shown_with_limits_and_variables() -> None:
    host = Host(system="Linux", cpu_limit=2.0, memory_limit_bytes=GIB, environment={"A": "1"})
    rows = host_rows(replace(host, is_container=True), Torch(num_threads=4))
    assert ("Kind", "container") in rows
    assert ("CPU", "? cores, ? threads, limited to 2.0 cores, torch uses 4") in rows
    assert ("Variable", "A=1") in rows
    assert "limited to 1.0 GiB" in dict(rows)["Memory"]


def test_speed_is_shown_with_its_share_of_the_peak() -> None:
    (first, second) = timing_rows([TIMING])
    assert first == (
        "cuda:0",
        "bfloat16 4096 x 4096 product: 0.20 ms, 687 TFLOP/s (69% of its peak)",
    )
    assert second[1].endswith("10 ms, 819,200 tokens/s, 400 TFLOP/s (MFU 40%)")
    assert matmul_text(Matmul("cpu", "float32", 8, problem="x")).endswith("failed (x)")
    assert step_text(TrainingStep("cpu", "no", problem="x")) == "float32 training step: failed (x)"
    assert [label for label, _ in forecast_rows(find_forecasts(FACTS))] == ["test", "production"]


def test_pipe_gets_plain_lines_that_cannot_steer_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_section("Title", [("Name", "\x1b[2J"), ("", "more")])
    print_findings([Finding("problem", "Broken\x07.", "Mend it."), Finding("ok", "Fine.")], "Done.")
    assert capsys.readouterr().out == (
        "Title:\n  Name: ?[2J\n    more\n\n"
        "Diagnosis:\n  [problem] Broken?.\n      Mend it.\n  [ok] Fine.\n  Done.\n"
    )


# The command


def test_this_machine_is_diagnosed_with_exit_code_0(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--quick")
    assert (result.returncode, result.stderr) == (0, "")
    for part in (
        "NVIDIA Driver:",
        "nvidia-smi: ",
        "CPU: ",
        "Build: ",
        "production: ",
        "Diagnosis:",
    ):
        assert part in result.stdout
    assert "Speed:" not in result.stdout
    assert "train.py " in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_this_machine_is_timed(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    value = json.loads(result.stdout)
    first = value["timings"][0]
    assert first["device"] == "cpu"
    assert first["matmuls"][0]["tflops"] > 0
    assert first["step"]["tokens_per_second"] > 0
    assert value["forecasts"][0]["seconds"] > 0
    assert value["interrupted"] is None


def test_machine_without_a_working_torch_is_diagnosed_too(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    result = run_script(tmp_path, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    value = json.loads(result.stdout)
    assert value["torch"]["problem"] == "libtorch_cpu.so: cannot open"
    assert (value["timings"], value["forecasts"]) == ([], [])
    assert value["findings"][0]["advice"] == "Run: bash setup.sh"
    assert value["verdict"] == "train.py cannot run: torch does not work."
    assert value["host"]["cpu_threads"] >= 1


def test_torch_that_dies_of_a_signal_is_diagnosed_too(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    result = run_script(tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    assert "torch cannot be imported: it ended by SIGILL." in result.stdout
