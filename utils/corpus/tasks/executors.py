"""Tasks run by datatrove's executors: on this machine, on Slurm, on Ray.

    --executor NAME --tasks N --> executor --> python scripts/prepare_data.py ... --task I
                                           '-> python scripts/prepare_data.py merge OUTPUT (Slurm)

Each task is the command that can be run by hand, in a process of its own. datatrove's own record of
what is done is not used: a task itself sees whether its part is there. A task that fails does not
end the others; the merge names it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.config_files import PROJECT_DIRECTORY
from utils.base.errors import UsageError, first_line

OLDEST_DATATROVE = "0.10"
EXECUTORS = {
    "local": ("datatrove.executor.local", "LocalPipelineExecutor"),
    "slurm": ("datatrove.executor.slurm", "SlurmPipelineExecutor"),
    "ray": ("datatrove.executor.ray", "RayPipelineExecutor"),
}


@dataclass(frozen=True)
class RunCommand:
    """A step of a pipeline that runs prepare_data.py, for each task or once."""

    words: tuple[str, ...]
    directory: str
    """Where the command was given: paths are relative to it."""
    num_threads: int
    must_succeed: bool
    """A failure is one of the step too."""
    is_task: bool = True

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Run it and wait for its end."""
        script = PROJECT_DIRECTORY / "scripts" / "prepare_data.py"
        own = ["--task", str(rank)] if self.is_task else []
        subprocess.run(  # noqa: S603
            [sys.executable, str(script), *self.words, *own],
            cwd=self.directory,
            env={**os.environ, "RAYON_NUM_THREADS": str(self.num_threads)},
            stdout=subprocess.DEVNULL,  # its summary; what went wrong is on standard error
            check=self.must_succeed,
        )


def plan_tasks(
    name: str, words: Sequence[str], num_tasks: int, output: str, settings: Mapping[str, Any]
) -> Callable[[], bool]:
    """Return a function that runs all tasks and tells whether that is over.

    On Slurm it submits them, and the merge after them. `words` are those of the command, `settings`
    what the executor is made with besides.

    Raises:
        UsageError: The executor is not installed, or takes no such settings.
    """
    executor = _load_executor(name)
    own: dict[str, Any] = {"skip_completed": False, **settings}
    logs, here = own.pop("logging_dir", None), str(Path.cwd())
    step = RunCommand(tuple(words), here, own.get("cpus_per_task", 1), name == "slurm")
    if name == "local":
        own.setdefault("workers", min(num_tasks, os.cpu_count() or 1))
    if name == "slurm":
        programs = Path(sys.executable).parent
        own.setdefault(
            "env_command", f"export PATH={programs}:$PATH PYTHONPATH={PROJECT_DIRECTORY}"
        )
    try:
        tasks = executor([step], tasks=num_tasks, logging_dir=logs and f"{logs}/tasks", **own)
        if name == "slurm":
            # After all tasks, whether or not each could do its part: the merge says which did not.
            own.update(depends=tasks, run_on_dependency_fail=True)
            merge = RunCommand(("merge", output), here, 1, must_succeed=True, is_task=False)
            tasks = executor([merge], tasks=1, logging_dir=logs and f"{logs}/merge", **own)
    except TypeError as exc:
        raise UsageError(
            f"--executor {name}: {first_line(exc)}. Set it right with --executor-option KEY=VALUE."
        ) from exc

    def run() -> bool:
        if name == "ray":
            _begin_ray()
        tasks.run()
        return name != "slurm"

    return run


def _load_executor(name: str) -> Any:
    module, class_name = EXECUTORS[name]
    package = "datatrove[ray]" if name == "ray" else "datatrove"
    # Read when ray is imported: its makers are not told of its use, and without a cluster to join
    # it listens on 127.0.0.1 alone, as it does on systems where it makes no clusters.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        if name == "ray":
            import_module("ray")
        return getattr(import_module(module), class_name)
    except ImportError as exc:
        raise UsageError(
            f"--executor {name} needs {package} ({first_line(exc)}): "
            f"pip install '{package}>={OLDEST_DATATROVE}'."
        ) from exc


def _begin_ray() -> None:
    """Join the cluster of RAY_ADDRESS, else make one of this machine that no other one sees."""
    import ray

    environment = {"env_vars": {"PYTHONPATH": str(PROJECT_DIRECTORY)}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=environment, ignore_reinit_error=True)
    else:
        ray.init(
            "local",
            runtime_env=environment,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
        )
