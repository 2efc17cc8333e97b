"""The ranks agree, share and gather; one process does so with itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from configs.config_files import PROJECT_DIRECTORY
from utils.base import ranks
from utils.base.errors import ConfigError


def test_one_process_is_all_ranks() -> None:
    ranks.connect_host_group()
    assert ranks.host_group() is None
    assert [ranks.any_rank(True), ranks.any_rank(False)] == [True, False]
    assert ranks.broadcast_from_main("value") == "value"
    assert ranks.gather_to_main(3) == [3]
    assert ranks.compute_on_main(lambda: 4) == 4
    with pytest.raises(ConfigError):
        ranks.compute_on_main(fail)


def fail() -> None:
    raise ConfigError("refused")


PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from configs.config_files import PROJECT_DIRECTORY
from utils.base import ranks
from utils.base.errors import ConfigError
from utils.training.stopping import StopRequest

found, rank = {}, int(os.environ["RANK"])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=rank, world_size=2
)

def fail():
    raise ConfigError("refused")

def attempt(function):
    try:
        return function()
    except ConfigError:
        return "ConfigError"
    except SystemExit as exc:
        return exc.code

found["before"] = [ranks.host_group() is None, ranks.gather_to_main(rank)]
used = []
made = []
def new_group(*arguments, function=torch.distributed.new_group, **options):
    made.append([options["backend"], options["timeout"].total_seconds() / 3600])
    return function(*arguments, **options)
torch.distributed.new_group = new_group
for name in ("all_reduce", "broadcast_object_list", "gather_object"):
    def spy(*arguments, function=getattr(torch.distributed, name), group=None, **options):
        used.append(group is not None and group is ranks.host_group())
        return function(*arguments, group=group, **options)
    setattr(torch.distributed, name, spy)
with StopRequest() as stop:
    group = ranks.host_group()
    ranks.connect_host_group()
    found["groups made"] = made
    found["group stays"] = group is not None and ranks.host_group() is group
    found["any"] = [ranks.any_rank(wish) for wish in (False, rank == 0, rank == 1, True)]
    found["broadcast"] = ranks.broadcast_from_main({"rank": rank})
    found["computed"] = ranks.compute_on_main(lambda: f"by {rank}")
    found["failed"] = attempt(lambda: ranks.compute_on_main(fail))
    found["gathered"] = ranks.gather_to_main([rank])
    agreed = [stop.is_agreed()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    agreed += [stop.is_agreed(), stop.is_agreed()]
    found["agreed"], found["reason"] = agreed, stop.reason
found["only the host group"] = bool(used) and all(used)
ranks.disconnect()
del group
found["after"] = ranks.host_group() is None
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two real processes found."""
    directory = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(directory)],
            cwd=PROJECT_DIRECTORY,
            env={**os.environ, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("before", ([True, [0, 1]], [True, None])),
        ("groups made", ([["gloo", 24.0]],) * 2),
        ("group stays", (True, True)),
        ("any", ([False, True, True, True],) * 2),
        ("broadcast", ({"rank": 0}, {"rank": 0})),
        ("computed", ("by 0", "by 0")),
        ("failed", ("ConfigError", 2)),
        ("gathered", ([[0], [1]], None)),
        ("agreed", ([False, True, True],) * 2),
        ("reason", ("another rank was asked to stop", "SIGTERM")),
        ("only the host group", (True, True)),
        ("after", (True, True)),
    ],
)
def test_two_ranks(found: list[dict[str, Any]], key: str, expected: tuple[Any, Any]) -> None:
    assert tuple(rank[key] for rank in found) == expected
