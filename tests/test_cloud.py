"""cloud/: the scripts are run with stand-ins for schedulers and launchers, the files are parsed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from configs.config_files import PROJECT_DIRECTORY
from configs.training_config import TrainingConfig
from tests.conftest import TINY
from utils.base.errors import ExitCode
from utils.checkpoints.layout import find_checkpoints

CLOUD = PROJECT_DIRECTORY / "cloud"
NODE = CLOUD / "node.sh"
AGAIN = {int(ExitCode.NOT_VERIFIED), int(ExitCode.STOPPED)}
FOR_GOOD = {int(ExitCode.USAGE), int(ExitCode.PREFLIGHT)}
WORDS = ["--config=test", "--max-steps=4"]
WORDS += [f"--set={setting}" for setting in (*TINY, "save_steps=2", "eval_steps=4", "report_to=[]")]


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLOUD / name).read_text("utf-8")))


def program(directory: Path, name: str, body: str) -> Path:
    """Put a stand-in on PATH."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder of stand-ins that comes first on PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    return programs


@pytest.fixture
def bash(tmp_path: Path, path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(
        *words: str | Path, cwd: Path = tmp_path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *map(str, words)],
            cwd=cwd,
            env=environment(path, **variables),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    return run


def environment(programs: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a script; its `venv` holds nothing."""
    own = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": own, "VENV": str(programs / "none"), "GPUS": "2", **variables}


NOTE_WORDS = 'printf "%s\\n" "$(basename "$0")" "$@" >"$NOTES"'
# Runs what the launcher would run on each rank of a machine, one after the other.
FAKE_RANKS = """
while [ "$1" != --no-python ]; do shift; done; shift
for RANK in $RANKS; do export RANK; "$@"; done
exit 1"""


def test_every_script_is_one_that_bash_reads(bash: Callable[..., Any]) -> None:
    for name in ("node.sh", "slurm.sbatch"):
        assert bash("-n", CLOUD / name).stderr == ""
    script = load("skypilot.yaml")[0]
    for part in ("setup", "run"):
        assert bash("-n", "-c", script[part]).stderr == ""


def test_a_machine_launches_its_ranks_where_torchrun_understands_it(
    path: Path, tmp_path: Path, bash: Callable[..., Any]
) -> None:
    from torch.distributed.run import get_args_parser

    program(path, "torchrun", NOTE_WORDS)
    variables = {
        "NUM_NODES": "4",
        "NODE_RANK": "3",
        "MAIN_ADDRESS": "main",
        "MAIN_PORT": "1234",
        "GPUS": "8",
        "GRACE_SECONDS": "7.5",
        "NOTES": str(tmp_path / "notes"),
    }
    result = bash(NODE, "--config", "production", "--set", "run_name=a b", **variables)
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "notes").read_text().split("\n")[1:-1]
    script = words.index("bash")
    parsed = get_args_parser().parse_args([*words[:script], "script"])
    assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("4", 3, "8")
    assert (parsed.master_addr, parsed.master_port) == ("main", 1234)
    assert parsed.no_python
    command = words[words.index("rank") + 1 :]
    assert command[:2] == ["python", str(PROJECT_DIRECTORY / "train.py")]
    arguments = train.parse_arguments(command[2:])
    assert (arguments.config, arguments.resume) == ("production", "latest")
    assert arguments.set == ["run_name=a b", "grace_seconds=7.5"]


def test_an_accelerate_configuration_is_launched_on_the_same_machines(
    path: Path, tmp_path: Path, bash: Callable[..., Any]
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    program(path, "accelerate", NOTE_WORDS)
    file = PROJECT_DIRECTORY / "configs" / "accelerate" / "ddp.yaml"
    variables = {
        "NUM_NODES": "2",
        "NODE_RANK": "1",
        "MAIN_ADDRESS": "main",
        "GPUS": "8",
        "MAIN_PORT": "47113",
        "ACCELERATE_CONFIG": str(file),
        "NOTES": str(tmp_path / "notes"),
    }
    assert bash(NODE, "--config", "production", **variables).returncode == 0
    words = (tmp_path / "notes").read_text().split("\n")[2:-1]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert parsed.config_file == str(file)
    prepare_multi_gpu_env(parsed)
    assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", 1, "8")
    assert (parsed.master_addr, parsed.master_port) == ("main", "47113")
    assert (parsed.training_script, parsed.no_python) == ("bash", True)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("75 75", 75),  # torchrun itself says 1
        ("2 2", 2),
        ("143 3", 3),  # one rank's own error, the other one was ended for it
        ("75 143", 75),
        ("143 75", 75),
        ("139 143", 139),
        ("4 0", 4),
        ("0 0", 1),  # no rank failed but the launcher did
    ],
)
def test_the_code_of_train_py_is_that_of_the_machine(
    codes: str, expected: int, path: Path, bash: Callable[..., Any]
) -> None:
    first, second = codes.split()
    program(path, "torchrun", FAKE_RANKS)
    program(path, "python", f'[ "$RANK" = 0 ] && exit {first}; exit {second}')
    result = bash(NODE, "--config", "test", RANKS="0 1")
    assert (result.returncode, result.stderr) == (expected, "")
    assert f"ends with code {expected}" in result.stdout


@pytest.mark.parametrize("word", ["--fresh", "--resume", "--resume=best"])
def test_what_a_restart_would_do_again_is_refused(word: str, bash: Callable[..., Any]) -> None:
    result = bash(NODE, "--config", "test", word)
    assert result.returncode == 2
    assert "a restart would do it again" in result.stderr


def test_the_help_is_the_top_of_the_file(bash: Callable[..., Any]) -> None:
    result = bash(NODE, "--help")
    assert result.returncode == 0
    variables = set(re.findall(r"\$\{([A-Z_]{4,}):?-", NODE.read_text("utf-8")))
    assert [name for name in variables - {"RANK"} if name not in result.stdout] == []


# Notes every SIGTERM, says when it is ready, and leaves with 1 once the file GO is there and its
# parent, node.sh, has nothing left to pass on: no signal is pending for it, and it sleeps.
PATIENT_LAUNCHER = f"""exec {sys.executable} -c '
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open(os.environ["NOTES"], "a").write("got\\n"))
os.write(1, b"ready\\n")
def is_calm():
    status = open(f"/proc/{{os.getppid()}}/status").read()
    return "ShdPnd:\\t0000000000000000" in status and "State:\\tS" in status
while not (os.path.exists(os.environ["GO"]) and is_calm()): time.sleep(0.02)
sys.exit(1)
'"""


@contextlib.contextmanager
def patient(
    script: Path, ready: int, go: Path, variables: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Run a script whose launchers wait for the file GO, and yield it when they are ready."""
    process = subprocess.Popen(
        ["bash", str(script), "--config", "test"],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(ready)] == ["ready\n"] * ready
        yield process
        go.touch()
        process.communicate(timeout=60)
    finally:
        go.touch()
        process.kill()


def wait_for_text(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait until a file has a text; fail when the process ends or a minute passes before."""
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text() == text):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def test_however_many_signals_come_ranks_get_one(path: Path, tmp_path: Path) -> None:
    # Two signals to a rank mean "leave at once".
    program(path, "torchrun", PATIENT_LAUNCHER)
    notes, go = tmp_path / "notes", tmp_path / "go"
    with patient(NODE, 1, go, environment(path, NOTES=str(notes), GO=str(go))) as process:
        os.killpg(process.pid, signal.SIGTERM)  # all of the step, as some schedulers do
        wait_for_text(notes, "got\n", process)
        os.killpg(process.pid, signal.SIGTERM)
    assert notes.read_text() == "got\n"
    assert process.returncode == 1


SRUN = """
while [ "${1#--}" != "$1" ]; do echo "srun $1" >>"$CLUSTER"; shift; done
trap 'echo "srun got TERM" >>"$CLUSTER"' TERM
for SLURM_NODEID in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    export SLURM_NODEID; "$@" & pids+=($!)
done
printf "%s\\n" "${pids[@]}" >"$PIDS.new"; mv "$PIDS.new" "$PIDS"
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; [ $code -le $worst ] || worst=$code; }; done
exit $worst"""
SCONTROL = """
echo "scontrol $*" >>"$CLUSTER"
case "$*" in
"show hostnames "*) echo "${FIRST_HOST:-host7}"; seq -f host%g 8 20000 ;;
"show job "*) echo "   JobState=${STATE:-RUNNING} Reason=None"; seq 20000 ;;
esac"""
SCANCEL = """
echo "scancel $*" >>"$CLUSTER"
[ "$1" = --signal=TERM ] && kill -TERM $(cat "$PIDS")"""


@pytest.fixture
def slurm(path: Path, tmp_path: Path) -> dict[str, str]:
    """A cluster of two nodes on this machine; what it was asked for is in the file CLUSTER."""
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        program(path, name, body)
    return {
        "CLUSTER": str(tmp_path / "cluster"),
        "PIDS": str(tmp_path / "pids"),
        "SLURM_SUBMIT_DIR": str(PROJECT_DIRECTORY),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "host[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "2",
    }


@pytest.mark.parametrize(
    ("code", "state", "restarts", "requeued"),
    [
        (0, "RUNNING", "0", False),
        (75, "RUNNING", "0", True),
        (4, "RUNNING", "3", True),
        (137, "RUNNING", "0", True),
        (2, "RUNNING", "0", False),
        (3, "RUNNING", "0", False),
        (75, "CANCELLED", "0", False),  # scancel by the user
        (1, "RUNNING", "100", False),
    ],
)
def test_slurm_requeues_what_a_restart_can_mend(
    code: int,
    state: str,
    restarts: str,
    requeued: bool,
    path: Path,
    slurm: dict[str, str],
    bash: Callable[..., Any],
) -> None:
    program(path, "torchrun", f"[ {code} = 0 ] && exit 0\n{FAKE_RANKS}")
    program(path, "python", f"exit {code}")
    result = bash(
        CLOUD / "slurm.sbatch",
        "--config",
        "production",
        RANKS="0",
        **slurm,
        STATE=state,
        SLURM_RESTART_COUNT=restarts,
    )
    assert result.returncode == code, result.stderr
    notes = Path(slurm["CLUSTER"]).read_text().splitlines()
    assert ("scontrol requeue 4711" in notes) == requeued
    assert "scontrol show hostnames host[7-8]" in notes
    assert "srun --kill-on-bad-exit=0" in notes
    assert sorted(re.findall(r"machine (\d) of 2 ends", result.stdout)) == ["0", "1"]


def test_slurm_gives_every_node_its_number_and_the_first_ones_address(
    path: Path, tmp_path: Path, slurm: dict[str, str], bash: Callable[..., Any]
) -> None:
    (tmp_path / "words").mkdir()
    folder = {"FOLDER": str(tmp_path)}
    program(path, "torchrun", 'echo "$@" >"$FOLDER/words/node$6"; exit 0')
    result = bash(CLOUD / "slurm.sbatch", "--config", "test", **slurm, **folder)
    assert result.returncode == 0, result.stderr
    for node in (0, 1):
        words = (tmp_path / "words" / f"node{node}").read_text()
        assert f"--nnodes 2 --nproc-per-node 2 --node-rank {node} --master-addr host7" in words
        assert f"--master-port {20000 + 4711}" in words
        assert "grace_seconds=150" in words


def test_slurm_passes_its_signal_to_the_nodes_and_not_to_srun(
    path: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    program(path, "torchrun", PATIENT_LAUNCHER)
    signals, go = tmp_path / "signals", tmp_path / "go"
    variables = environment(path, **slurm, NOTES=str(signals), GO=str(go))
    with patient(CLOUD / "slurm.sbatch", 2, go, variables) as process:
        process.send_signal(signal.SIGTERM)  # --signal=B:TERM reaches the batch script alone
        wait_for_text(signals, "got\n" * 2, process)
    assert signals.read_text() == "got\n" * 2
    notes = Path(slurm["CLUSTER"]).read_text()
    assert "scancel --signal=TERM 4711" in notes
    assert "srun got TERM" not in notes
    assert "scontrol requeue 4711" in notes


def test_slurm_wants_the_projects_folder(
    tmp_path: Path, slurm: dict[str, str], bash: Callable[..., Any]
) -> None:
    result = bash(CLOUD / "slurm.sbatch", **{**slurm, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert result.returncode == 2
    assert "submit it from there" in result.stderr


def test_slurms_lines_stand_first_and_leave_time_for_the_save() -> None:
    lines = (CLOUD / "slurm.sbatch").read_text("utf-8").splitlines()
    options = [line.split(" ", 1)[1] for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : len(options) + 1] == [f"#SBATCH {option}" for option in options]
    assert "--requeue" in options
    assert "--open-mode=append" in options  # a requeued job keeps its log
    seconds = int(next(o for o in options if o.startswith("--signal=B:TERM@")).split("@")[1])
    grace = int(re.findall(r"GRACE_SECONDS:-(\d+)", "\n".join(lines))[0])
    assert grace < seconds
    wait = int(re.findall(r"--wait=(\d+)", "\n".join(lines))[0])
    assert wait > TrainingConfig().upload_deadline_seconds


def test_skypilot_wants_its_buckets_and_launches_every_node_with_its_number(
    path: Path, tmp_path: Path, bash: Callable[..., Any]
) -> None:
    script = load("skypilot.yaml")[0]
    result = bash("-c", script["run"], cwd=PROJECT_DIRECTORY, **script["envs"])
    assert result.returncode == 2
    assert "--env DATA_URI=" in result.stderr
    program(path, "torchrun", NOTE_WORDS)
    variables = {
        **script["envs"],
        "DATA_URI": "gs://b/data",
        "CHECKPOINT_URI": "gs://b/run 1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n",
        "NOTES": str(tmp_path / "notes"),
    }
    result = bash("-c", script["run"], cwd=PROJECT_DIRECTORY, **variables)
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "notes").read_text().split("\n")[1:-1]
    line = shlex.join(words)
    assert "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr 10.0.0.7" in line
    arguments = train.parse_arguments(words[words.index("rank") + 3 :])
    assert arguments.config == "production"
    assert arguments.resume == "latest"
    assert "checkpoint_uri=gs://b/run 1" in arguments.set
    assert f"grace_seconds={script['envs']['GRACE_SECONDS']}" in arguments.set


def test_skypilot_recovers_what_a_restart_can_mend() -> None:
    script = load("skypilot.yaml")[0]
    recovery = script["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == AGAIN
    assert recovery["max_restarts_on_errors"] >= 1


def test_gkes_parts_belong_together() -> None:
    account, service, job = load("gke.yaml")
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["MAIN_ADDRESS"] == f"{name}-0.{pod['subdomain']}"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NUM_NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["GPUS"]
    assert "job-completion-index" in str(container["env"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/dev/shm"}
    arguments = train.parse_arguments(container["args"])
    assert any(word.startswith("checkpoint_uri=gs://") for word in arguments.set)


def test_gke_restarts_what_a_restart_can_mend_and_waits_for_the_save() -> None:
    job = load("gke.yaml")[2]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    grace = float(variables["GRACE_SECONDS"])
    assert TrainingConfig(grace_seconds=grace).grace_seconds == grace
    assert pod["terminationGracePeriodSeconds"] > grace
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy demands
    rules = job["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"] for rule in rules if "onExitCodes" in rule}
    assert set(codes["FailJob"]["values"]) == FOR_GOOD
    assert set(codes["Ignore"]["values"]) == AGAIN
    assert {codes[action]["containerName"] for action in codes} == {container["name"]}
    disruption = rules[-1]
    assert disruption["action"] == "Ignore"
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_has_what_it_copies_no_root_and_no_secret() -> None:
    steps = instructions((CLOUD / "Dockerfile").read_text("utf-8"))
    names = [word for word, _ in steps]
    assert names[:2] == ["ARG", "FROM"]
    assert "ADD" not in names
    user = next(rest for word, rest in reversed(steps) if word == "USER")
    assert user not in ("root", "0")
    assert names.index("USER") < names.index("COPY")
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY"]
    assert all((PROJECT_DIRECTORY / source).exists() for sources in copied for source in sources)
    (entry,) = (rest for word, rest in steps if word == "ENTRYPOINT")
    script = re.findall(r'"([^"]+node\.sh)"', entry)[0]
    assert (PROJECT_DIRECTORY / Path(script).relative_to("/opt/pretrain")).is_file()
    workdirs = [rest for word, rest in steps if word == "WORKDIR"]
    mounted = load("gke.yaml")[2]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert workdirs[-1] in [mount["mountPath"] for mount in mounted]
    ignored = (CLOUD / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert {".git", "venv*", "bucket", "checkpoints/*", "**/*credentials*.json"} <= set(ignored)


@pytest.mark.slow
def test_two_machines_on_slurm_train_stop_on_its_signal_and_go_on(
    path: Path, tmp_path: Path, sample_data: Path, slurm: dict[str, str]
) -> None:
    """Real torchrun, real ranks: two nodes of one process each, on this machine."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("cloud", "configs", "scripts", "train.py", "utils"):
        (project / name).symlink_to(PROJECT_DIRECTORY / name)
    variables = {
        **slurm,
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_GPUS_ON_NODE": "1",
        "GPUS": "1",
        "FIRST_HOST": "127.0.0.1",
        "MAIN_PORT": "29713",
        "OMP_NUM_THREADS": "1",
    }
    words = [*WORDS, f"--set=data_uri={sample_data}"]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(project / "cloud" / "slurm.sbatch"), *words, *more],
            env=environment(path, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process = start("--max-steps=100000", "--set=logging_steps=1")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "checkpoint at step 2" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=900)
    assert process.returncode == ExitCode.STOPPED, "".join(seen) + out
    assert "Second SIGTERM" not in out
    assert "scontrol requeue 4711" in Path(slurm["CLUSTER"]).read_text()
    (saved,) = find_checkpoints(project / "checkpoints")[-1:]
    assert (project / "bucket" / "Checkpoints" / f"{saved}.tar.gz").is_file()
    again = start("--max-steps=100000", f"--stop-after={saved.step + 2}")
    out, _ = again.communicate(timeout=900)
    assert again.returncode == 0, out
    assert f"(step {saved.step})" in out
    assert find_checkpoints(project / "checkpoints")[-1].step == saved.step + 2


@pytest.mark.slow
def test_machines_that_share_nothing_but_the_bucket_go_on(
    path: Path, tmp_path: Path, sample_data: Path
) -> None:
    bucket = f"--set=checkpoint_uri={tmp_path / 'bucket'}"

    def run(*more: str) -> str:
        words = [*WORDS, f"--set=data_uri={sample_data}", bucket, *more]
        processes = []
        for rank, folder in enumerate("ab"):
            (tmp_path / folder).mkdir(exist_ok=True)
            variables = {
                "NUM_NODES": "2",
                "NODE_RANK": str(rank),
                "GPUS": "1",
                "MAIN_PORT": "29731",
                "OMP_NUM_THREADS": "1",
            }
            processes.append(
                subprocess.Popen(
                    ["bash", str(NODE), *words],
                    cwd=tmp_path / folder,
                    env=environment(path, **variables),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outs = [process.communicate(timeout=900)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outs
        return outs[0]

    run("--stop-after=2")
    shutil.rmtree(tmp_path / "a")  # a new machine in its place
    out = run()
    assert "Downloaded checkpoint-epoch0-step2" in out
    assert "to 1 machines that do not see it" in out
    assert find_checkpoints(tmp_path / "a" / "checkpoints")[-1].step == 4
    assert not list((tmp_path / "b").glob("checkpoints/*"))
