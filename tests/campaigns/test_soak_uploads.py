"""A campaign of uploads finds nothing in the uploader, and finds what is put in its way."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns import soak_uploads
from tests.campaigns.soak_uploads import (
    LONG_WAY,
    WAYS,
    Campaign,
    RoundPlan,
    StartPlan,
    draw_start,
    find_growth,
    plan_rounds,
)
from tests.disturbed_buckets import TROUBLES, draw_trouble
from tests.sample_checkpoints import make_checkpoint
from utils.base.errors import TransientStorageError
from utils.checkpoints.layout import read_json
from utils.storage.bucket import crc32c_of_file
from utils.tools.proofs.started_runs import Running
from utils.uploads.job import UploadJob
from utils.uploads.process import run_in_process
from utils.uploads.transports import TransportOptions

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of processes"),
    pytest.mark.usefixtures("logging_as_before"),
]
DIRECTORY = next(way for way in WAYS if way.name == "directory")
STEP_1 = "checkpoint-epoch0-step1-files0"


@pytest.mark.slow
def test_a_short_campaign_finds_nothing(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    words = ["--cycles", "8", "--ways", "directory,python", "--json", str(report)]
    assert soak_uploads.main(words) == 0
    results = read_json(report)
    assert results["findings"] == []
    names = {"directory", LONG_WAY.name, "python, 1 stream", "python, 4 streams"}
    assert set(results["ways"]) == names
    assert sum(way["cycles"] for way in results["ways"].values()) >= 8
    for way in results["ways"].values():
        assert way["verified"] + way["given_up"] >= way["cycles"] > 0
    assert results["sizes"]


class Vandal:
    """Starts the stand-in trainer; does something before the second start."""

    def __init__(self, round_folder: Path, damage: Callable[[Path, Mapping[str, str]], None]):
        self._folder, self._damage, self._starts = round_folder, damage, 0

    def __call__(self, plan: Path, output: Path, environment: Mapping[str, str]) -> Running:
        self._starts += 1
        if self._starts == 2:
            self._damage(self._folder, environment)
        return soak_uploads.launch(plan, output, environment)


def flip_a_bit(folder: Path, _: Mapping[str, str]) -> None:
    archive = folder / f"bucket/Checkpoints/{STEP_1}.tar.gz"
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)


def swap_the_content(folder: Path, _: Mapping[str, str]) -> None:
    """Another checkpoint's archive, with a sidecar that fits to its bytes."""
    sidecars = folder / "bucket/Checkpoints"
    archive = sidecars / f"{STEP_1}.tar.gz"
    subprocess.run(["tar", "czf", archive, "-C", folder, "plan.json"], check=True)
    sidecar = read_json(sidecars / f"{STEP_1}.json")
    sidecar["archive"] = {"size": archive.stat().st_size, "crc32c": crc32c_of_file(archive)}
    (sidecars / f"{STEP_1}.json").write_text(json.dumps(sidecar))


def lose_a_checkpoint(folder: Path, _: Mapping[str, str]) -> None:
    shutil.rmtree(folder / "checkpoints" / STEP_1)


def lose_an_archive(folder: Path, _: Mapping[str, str]) -> None:
    for suffix in (".tar.gz", ".json"):
        (folder / f"bucket/Checkpoints/{STEP_1}{suffix}").unlink()


def give_one_up(folder: Path, _: Mapping[str, str]) -> None:
    line = {"checkpoint": STEP_1, "state": "superseded", "run_id": "x", "time": ""}
    with (folder / "checkpoints/uploads.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def leave_a_part(folder: Path, _: Mapping[str, str]) -> None:
    part = folder / f"bucket/Checkpoints/.parts/{STEP_1}.tar.gz/00000"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"part")


def leave_a_process(_: Path, environment: Mapping[str, str]) -> None:
    code = "import time; time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", code], env=dict(environment))


@pytest.mark.parametrize(
    ("damage", "kind", "text"),
    [
        (flip_a_bit, "corrupt", f"{STEP_1} in the bucket: the archive is"),
        (swap_the_content, "corrupt", f"{STEP_1} in the bucket: the archive cannot be unpacked"),
        (lose_a_checkpoint, "lost", f"{STEP_1} is gone, one of the newest 3 or the best"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                (
                    lose_an_archive,
                    "unverified",
                    f"{STEP_1}: the journal has it, the bucket has not",
                ),
                (give_one_up, "lost", f"{STEP_1} was given up, although it was verified"),
                (leave_a_part, "leftover", f"Checkpoints/.parts/{STEP_1}.tar.gz/00000 is left"),
                (leave_a_process, "leftover", "Processes outlive their start"),
            ]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_what_is_broken_is_found(
    damage: Callable[[Path, Mapping[str, str]], None],
    kind: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soak_uploads, "ORPHAN_SECONDS", 0.2)
    monkeypatch.setattr(soak_uploads, "draw_start", lambda *_: StartPlan(1, 0.0, 20.0))
    campaign = Campaign(tmp_path, 0, launch=Vandal(tmp_path / "round-1", damage))
    results = campaign.run([RoundPlan(1, DIRECTORY, 2)])
    assert any(f.kind == kind and text in f.text for f in results.findings), results.findings
    assert (tmp_path / "round-1").is_dir()  # to be looked at


def test_a_start_that_fails_is_found(tmp_path: Path) -> None:
    def fail(plan: Path, output: Path, environment: Mapping[str, str]) -> Running:
        output.write_text("no such thing")
        return subprocess.Popen(["false"])

    results = Campaign(tmp_path, 0, launch=fail).run([RoundPlan(1, DIRECTORY, 1)])
    assert any("no such thing" in finding.text for finding in results.findings)


def test_an_upload_process_is_found_and_killed_alone(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1)
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")  # whose reader waits for ever
    options = TransportOptions(str(tmp_path / "bucket"), "directory", stall_seconds=1.0)
    hits: list[bool] = []

    def kill() -> bool:
        hits.append(soak_uploads.kill_target(os.getpid(), "upload"))
        return False

    with pytest.raises(TransientStorageError, match="code -9"):
        run_in_process(UploadJob(str(checkpoint), options), must_end=kill)
    assert any(hits)


def test_growth_is_what_grows_after_the_first_uploads() -> None:
    steady = {"rss": 50_000_000, "threads": 2, "files": 5, "children": 0}
    sizes: list[dict[str, Any]] = [{"uploads": n, **steady} for n in range(1, 101)]
    for size in sizes[:15]:
        size["rss"], size["files"] = 10_000_000, 9
    assert find_growth(sizes) == []
    for size in sizes[60:]:
        size["rss"], size["files"] = 70_000_000, 6
    assert find_growth(sizes) == [
        "files of the process: 5 after 20 uploads, 6 after 100.",
        "memory of the process grew by 19.1 MiB.",
    ]


def test_five_hundred_cycles_have_fifty_of_gsutil_and_a_long_start_of_a_hundred() -> None:
    plans = plan_rounds(500, WAYS, random.Random(1))
    assert plans == plan_rounds(500, WAYS, random.Random(1))
    assert sum(plan.cycles for plan in plans) >= 500
    assert sum(plan.cycles for plan in plans if plan.way.transport == "gsutil") >= 50
    assert [plan.cycles for plan in plans if plan.is_long] == [100]
    assert {plan.way.name for plan in plans} == {LONG_WAY.name, *(way.name for way in WAYS)}
    assert [plan.number for plan in plans] == list(range(1, len(plans) + 1))


def test_starts_are_drawn_with_every_trouble_and_every_kill() -> None:
    source = random.Random(2)
    starts = [draw_start(way, 20, source) for _ in range(300) for way in WAYS]
    assert {trouble.kind for start in starts for trouble in start.troubles} == set(TROUBLES)
    assert {s.kill.target for s in starts if s.kill} == set(soak_uploads.TARGETS)
    assert max(start.saves for start in starts) > 2 * 3  # so many that some are given up
    for kind in TROUBLES:
        assert draw_trouble(kind, source, 1.0, 1.0).kind == kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cycles", "4"), "--cycles must be at least 5, got 4"),
        (("--ways", "pigeon"), "--ways pigeon leaves none"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert soak_uploads.main(list(words)) == 2
    assert message in capsys.readouterr().err
