"""A campaign of crashes finds nothing in train.py, and finds what is put in its way."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.campaigns import soak
from tests.campaigns.fork_server import ForkServer
from tests.campaigns.soak import ANCHORS, Campaign, Plan, find_strace, parse_trace, plan_kills
from utils.checkpoints.layout import find_checkpoints, read_json
from utils.tools.proofs.started_runs import Launcher, Running

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks train.py"),
    pytest.mark.usefixtures("logging_as_before"),
]


class Vandal:
    """Starts train.py; once, before that, damages the newest checkpoint and empties the bucket."""

    def __init__(self, launcher: Launcher, work: Path) -> None:
        self._launcher, self._work = launcher, work
        self.damaged = ""

    def start(self, words: Sequence[str], output: Path) -> Running:
        directory = self._work / "checkpoints" / "round-1"
        names = find_checkpoints(directory)
        if len(names) > 1 and not self.damaged:
            self.damaged = str(names[-1])
            path = directory / self.damaged / "optimizer.bin"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            shutil.rmtree(self._work / "bucket" / "round-1")
        return self._launcher.start(words, output)


@pytest.mark.slow
def test_six_kills_lose_nothing_and_a_damaged_checkpoint_is_noticed(
    server: ForkServer, sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command makes a server of its own; loading torch once is enough here.
    monkeypatch.setattr(soak, "ForkServer", lambda environment: nullcontext(server))
    report = tmp_path / "soak.json"
    words = ["--kills", "6", "--syscall-kills", "0", "--steps", "30", "--json", str(report)]
    code = soak.main([*words, "--data", str(sample_data)])
    results = read_json(report)
    assert results["findings"] == []
    assert code == 0
    assert len(results["kills"]) == 6
    assert results["rounds"] >= 1
    assert results["resumed"] >= 5
    assert results["verified"] >= 10
    assert {kill["kind"] for kill in results["kills"]} == {"random"}

    work = tmp_path / "vandal"
    work.mkdir()
    vandal = Vandal(server, work)
    campaign = Campaign(work, sample_data, 20, vandal, extra=["background_save=false"])
    found = campaign.run([Plan("random", "commit", 0.5)] * 2)
    assert vandal.damaged
    lost = [finding.text for finding in found.findings if finding.kind == "lost"]
    assert any("went on from step" in text for text in lost), found.findings
    assert any("set aside" in text and vandal.damaged in text for text in lost)


@pytest.mark.slow
def test_kills_at_system_calls_lose_nothing(sample_data: Path, tmp_path: Path) -> None:
    _, reason = find_strace()
    if reason:
        pytest.skip(reason)
    report = tmp_path / "soak.json"
    words = ["--kills", "2", "--syscall-kills", "4", "--steps", "40", "--json", str(report)]
    assert soak.main([*words, "--data", str(sample_data)]) == 0
    calls = [kill["call"] for kill in read_json(report)["kills"] if kill["kind"] == "syscall"]
    assert len(calls) == 4
    assert all(calls)


def test_without_strace_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_strace() == ([], "strace is not installed")


def test_a_trace_gives_the_calls_of_one_thread_and_the_paths_of_one_checkpoint() -> None:
    text = (
        '7 mkdir("/w/c/.saving-checkpoint-epoch0-step6-files0", 0777) = 0\n'
        '7 openat(AT_FDCWD</w>, "/w/c/.saving-checkpoint-epoch0-step6-files0/a.bin", O_WRONLY) = '
        "5</w/c/.saving-checkpoint-epoch0-step6-files0/a.bin>\n"
        '7 write(5</w/c/.saving-checkpoint-epoch0-step6-files0/a.bin>, "x", 1) = 1\n'
        '9 write(5</w/c/checkpoint-epoch0-step6-files0.tar.gz>, "x", 1) = 1\n'
        '9 write(5</w/c/checkpoint-epoch0-step6-files0.tar.gz>, "x", 1) = 1\n'
        '7 write(5</w/c/checkpoint-epoch0-step8-files0/a.bin>, "x", 1) = 1\n'
        '7 write(5</elsewhere/checkpoint-epoch0-step6-files0>, "x", 1) = 1\n'
        "7 +++ exited with 0 +++\n"
    )
    trace = parse_trace(text, Path("/w"), "checkpoint-epoch0-step6-files0")
    assert trace.counts == {"mkdir": 1, "openat": 1, "write": 2}
    assert trace.paths == ("/w/c/.saving-{name}", "/w/c/.saving-{name}/a.bin", "/w/c/{name}.tar.gz")


def test_a_plan_depends_on_its_seed_alone_and_has_every_anchor() -> None:
    plans = plan_kills(100, 7, random.Random(5))
    assert plans == plan_kills(100, 7, random.Random(5))
    assert plans != plan_kills(100, 7, random.Random(6))
    assert sum(plan.kind == "syscall" for plan in plans) == 7
    assert {plan.anchor for plan in plans if plan.kind == "random"} == set(ANCHORS)
    assert {plan.main_only for plan in plans} == {True, False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kills", "0", "--syscall-kills", "0"), "must not be negative, nor both 0"),
        (("--kills", "-1"), "must not be negative"),
        (("--steps", "21"), "--steps must be at least 20 and even, got 21"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert soak.main(list(words)) == 2
    assert message in capsys.readouterr().err
