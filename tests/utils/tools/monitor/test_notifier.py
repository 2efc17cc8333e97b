"""The user's command runs once for each event, and whatever it does, the monitor goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from utils.base.errors import UsageError
from utils.tools.monitor.notifier import Notifier, RunEvent, parse_command

EVENT = RunEvent("stalled", "it's $(silent) `now`", "run-1", 50, "stalled", "2026-01-01T00:00:00")
# Environment and standard input, as the command found them.
RECORD = """
import json, os, sys
found = {k: v for k, v in os.environ.items() if k.startswith("PRETRAIN_")}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([found, json.load(sys.stdin)]) + "\\n")
"""


@contextmanager
def notifier(
    *words: str, limit_seconds: float = 20.0, patience: float = 20.0
) -> Iterator[Notifier]:
    running = Notifier(list(words), limit_seconds)
    try:
        yield running
    finally:
        running.close(patience)


def test_the_command_gets_the_event_in_its_environment_and_as_json(tmp_path: Path) -> None:
    with notifier(sys.executable, "-c", RECORD, str(tmp_path / "out")) as running:
        running.tell(EVENT)
    environment, value = json.loads((tmp_path / "out").read_text())
    assert environment == {
        "PRETRAIN_EVENT": "stalled",
        "PRETRAIN_MESSAGE": "it's $(silent) `now`",
        "PRETRAIN_RUN": "run-1",
        "PRETRAIN_STEP": "50",
    }
    assert value == {
        "event": "stalled",
        "message": "it's $(silent) `now`",
        "run": "run-1",
        "step": 50,
        "state": "stalled",
        "time": "2026-01-01T00:00:00",
    }
    assert running.take_complaints() == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("false",), "false for stalled: exit code 1"),
        (("sh", "-c", "echo no such channel >&2; exit 7"), "exit code 7: no such channel"),
        (("sh", "-c", "printf 'a\\033[2J' >&2; exit 1"), "exit code 1: a?[2J"),
        (("/nonexistent/command",), "cannot be started: No such file or directory"),
        (("/",), "cannot be started: Permission denied"),
    ],
)
def test_a_command_that_fails_costs_one_line(words: tuple[str, ...], complaint: str) -> None:
    with notifier(*words) as running:
        running.tell(EVENT)
    (found,) = running.take_complaints()
    assert complaint in found
    assert running.take_complaints() == []


def test_a_command_that_hangs_is_ended_with_its_children_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    script = f"echo >> {tmp_path}/begun; test $PRETRAIN_EVENT = finished || {{ sleep 600 & wait; }}"
    with notifier("sh", "-c", script, limit_seconds=0.2) as running:
        running.tell(EVENT)
        running.tell(RunEvent("finished", "", "", None, "finished", ""))
    assert running.take_complaints() == ["--notify-command: sh for stalled: was ended after 0.2 s"]
    assert len((tmp_path / "begun").read_text().splitlines()) == 2


def test_leaving_ends_what_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    script = f"echo > {tmp_path}/begun; sleep 600"
    with notifier("sh", "-c", script, limit_seconds=600.0, patience=0.1) as running:
        running.tell(EVENT)
        (tmp_path / "begun").read_text()
    assert running._process is not None
    assert running._process.poll() == -signal.SIGKILL


def test_a_command_is_split_as_a_shell_splits_it() -> None:
    assert parse_command("notify-send 'my run' --urgent") == ["notify-send", "my run", "--urgent"]
    for text in ("", "  ", "echo 'open"):
        with pytest.raises(UsageError, match="--notify-command"):
            parse_command(text)
