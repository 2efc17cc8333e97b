"""A run on GPUs of Modal: data and checkpoints on a volume, restarts by Modal.

    pip install 'modal>=1.5' && modal setup        # once; nothing else need be installed here
    modal run cloud/modal_app.py::upload --local-path data --remote-path data
    modal run cloud/modal_app.py::ls --path checkpoints
    modal run --detach cloud/modal_app.py::train --gpu A10G --config tinystories --run-name first
    modal run cloud/modal_app.py::generate --run-name first --prompt "Once upon a time"
    modal run cloud/modal_app.py::evaluate --run-name first
    modal run cloud/modal_app.py::export --run-name first          # to exports/first on the volume
    modal run cloud/modal_app.py::download --remote-path exports/first --local-path exported
    modal run cloud/modal_app.py::delete --path checkpoints/first

`modal run cloud/modal_app.py::train --help` lists the options of each. `--detach` lets a run go on
when this machine goes away. The same command again goes on from the newest checkpoint.

    volume: data/            what prepare_data.py wrote
            checkpoints/RUN/Checkpoints/*.tar.gz    the bucket of a run: archives and sidecars
            exports/RUN/     exported models
    container: /srv/pretrain/RUN    output_dir, logs and cache; gone with the container

Modal restarts a container that it takes away (SIGINT, 30 s), that crashed, or whose time was up; a
restart resumes the newest archive of the volume. What the volume has not committed when a container
is killed is lost: seconds. Run one container at a time for a run name: containers do not see each
other's files before a commit, so the lease in the bucket cannot tell two of them apart.

PRETRAIN_VOLUME        name of the volume (default: pretrain); made if it is missing
PRETRAIN_GCS_SECRET    secret with SERVICE_ACCOUNT_JSON, for gs:// (default: googlecloud-secret)
PRETRAIN_WANDB_SECRET  secret with WANDB_API_KEY, for --wandb (default: wandb-secret)
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import modal

MOUNT = "/volume"
RUNS = "/srv/pretrain"
REMOTE_PROJECT = "/opt/pretrain"
PROJECT = Path(__file__).resolve().parents[1] if modal.is_local() else Path(REMOTE_PROJECT)

VOLUME = os.environ.get("PRETRAIN_VOLUME", "pretrain")
GCS_SECRET = os.environ.get("PRETRAIN_GCS_SECRET", "googlecloud-secret")
WANDB_SECRET = os.environ.get("PRETRAIN_WANDB_SECRET", "wandb-secret")

DEFAULT_GPU = "A10G"
CORES = 4.0
MEMORY_MIB = 16 * 1024  # a request: a checkpoint's copy in host memory may take more
MAX_HOURS = 24.0  # Modal's limit for one attempt
MAX_RETRIES = 10  # and for attempts after the first
SCRIPT_SECONDS = 4 * 3600
RESERVE_SECONDS = 900.0
"""Kept of an attempt's time: to save, and to upload what the grace period is too short for."""
GRACE_SECONDS = 20
"""Of the 30 s that Modal leaves after its SIGINT; the rest is for the commit of the volume."""
SAVE_SECONDS = 600

NOT_VERIFIED, STOPPED = 4, 75  # exit codes of train.py
FOR_GOOD = (2, 3)
"""Wrong configuration or data, refused by the preflight: it would fail again."""


def ignored() -> list[str]:
    """Return what of the project's folder does not go into a container."""
    if not modal.is_local():
        return []
    lines = (PROJECT / "cloud" / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


app = modal.App("pretrain")
volume = modal.Volume.from_name(VOLUME, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")  # with a compiler, which torch.compile wants
    .add_local_file(str(PROJECT / "requirements.txt"), "/tmp/requirements.txt", copy=True)  # noqa: S108
    .add_local_file(str(PROJECT / "constraints.txt"), "/tmp/constraints.txt", copy=True)  # noqa: S108
    .run_commands(
        "python -m pip install --no-cache-dir --constraint /tmp/constraints.txt"
        " --requirement /tmp/requirements.txt wandb"
    )
    # The container reads this file too, and must mean the same volume.
    .env({"PRETRAIN_VOLUME": VOLUME, "PYTHONUNBUFFERED": "1"})
    .add_local_dir(str(PROJECT), REMOTE_PROJECT, ignore=ignored())
)
CONTAINER: dict[str, Any] = {
    "image": image,
    "volumes": {MOUNT: volume},
    "gpu": DEFAULT_GPU,
    "cpu": CORES,
    "memory": MEMORY_MIB,
}


def refuse(message: str) -> NoReturn:
    """End a command because of what it was told."""
    print(f"modal_app.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def require_run_name(name: str) -> str:
    """Return the name of a run, which becomes a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        refuse(f"--run-name must be letters, digits, '.', '_' and '-', got {name!r}.")
    return name


def volume_path(text: str) -> str:
    """Return a path below the volume's root, without a slash before it; '' is the root."""
    if re.match(r"[^/]*:[/\\]|(gs|s3)//", text, re.IGNORECASE):  # gs:/bucket, s3://bucket, ...
        refuse(f"{text!r} is no path on the volume; a bucket is gs://BUCKET[/PREFIX].")
    parts = [part for part in PurePosixPath(text).parts if part != "/"]
    if ".." in parts or not text.isprintable():
        refuse(f"{text!r} is no path on the volume.")
    return "/".join(parts)


def location(text: str) -> str:
    """Return a URI as a container sees it: gs:// as it is, a path of the volume below its mount."""
    return text if text.startswith("gs://") else f"{MOUNT}/{volume_path(text)}"


def config_word(config: str) -> str:
    """Return a configuration as a container finds it: a name, or a JSON file of the project."""
    if not config.endswith(".json"):
        return config
    path = Path(config).resolve()
    if not path.is_file() or not path.is_relative_to(PROJECT):
        refuse(f"--config {config} is no file of this project: put it into configs/.")
    return f"{REMOTE_PROJECT}/{path.relative_to(PROJECT).as_posix()}"


def run_settings(
    config: str, data: str, checkpoints: str, run_name: str, more: Sequence[str] = ()
) -> list[str]:
    """Return the words that tell train.py which run is meant; `more` are KEY=VALUE, and win."""
    values = [
        f"data_uri={location(data)}",
        f"checkpoint_uri={location(checkpoints)}",
        f"run_name={require_run_name(run_name)}",
        f"save_seconds={SAVE_SECONDS}",
        *more,
    ]
    return ["--config", config, *(word for value in values for word in ("--set", value))]


def train_command(settings: Sequence[str], max_steps: int) -> list[str]:
    """Return the command of an attempt; node.sh resumes the newest checkpoint by itself."""
    length = ["--max-steps", str(max_steps)] if max_steps else []
    return ["bash", f"{REMOTE_PROJECT}/cloud/node.sh", *settings, *length]


def script_command(script: str, *words: str) -> list[str]:
    """Return the command of one of the project's scripts."""
    return [sys.executable, f"{REMOTE_PROJECT}/scripts/{script}.py", *words]


def find_secrets(*uris: str, wandb: bool = False) -> list[modal.Secret]:
    """Return the secrets that a container needs."""
    names = [GCS_SECRET] if any(uri.startswith("gs://") for uri in uris) else []
    names += [WANDB_SECRET] if wandb else []
    return [modal.Secret.from_name(name) for name in names]


def container_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of commands; a service account's key goes into a file for them."""
    found = {**environment, "GRACE_SECONDS": str(GRACE_SECONDS)}
    key = found.pop("SERVICE_ACCOUNT_JSON", "")
    if key:
        path = folder / "service-account.json"
        path.touch(mode=0o600)
        path.write_text(key, "utf-8")
        found["GOOGLE_APPLICATION_CREDENTIALS"] = str(path)
    return found


def run_until(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> int:
    """Run a command and return its exit code; ask it to stop when its time is up.

    Modal's interrupt arrives as a KeyboardInterrupt, and goes on when the command has stopped. The
    command gets one SIGTERM and no more: a second one means "leave at once".
    """
    process = subprocess.Popen(  # noqa: S603 - no shell
        command, cwd=folder, env=environment, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print("modal_app.py: the time of this attempt is up: saving.", flush=True)
        process.terminate()
        return process.wait(RESERVE_SECONDS / 2)
    except BaseException:  # also Modal's InputCancellation
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS + 3)
        raise
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.wait()


def kill_tree(pid: int) -> None:
    """End what is left of a command: its ranks are in sessions of their own."""
    import psutil  # the container has it

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def attempt(settings: list[str], max_steps: int, folder: Path, seconds: float) -> int:
    """Train until the end, or until the time of this attempt is up.

    Returns:
        The exit code of train.py, where it is the last word.

    Raises:
        RuntimeError: There is more to do; Modal's retry starts again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = container_environment(folder, os.environ)
    command = train_command(settings, max_steps)
    code = run_until(command, folder, environment, seconds - RESERVE_SECONDS)
    if code in (NOT_VERIFIED, STOPPED):  # what is owed to the bucket goes there first
        upload_all = script_command("upload_manager", "upload-all", *settings)
        owed = subprocess.call(upload_all, cwd=folder, env=environment)  # noqa: S603 - no shell
        if owed == 0 and code == NOT_VERIFIED:
            code = 0
    if code != 0 and code not in FOR_GOOD:
        raise RuntimeError(f"train.py ended with code {code}: the next attempt goes on from there.")
    return code


@app.function(
    **CONTAINER,
    timeout=int(MAX_HOURS * 3600),
    retries=modal.Retries(max_retries=MAX_RETRIES, initial_delay=10.0, backoff_coefficient=2.0),
)
def train_on_gpu(settings: list[str], max_steps: int, run_name: str, seconds: float) -> int:
    """Train in a container; see `attempt`."""
    try:
        return attempt(settings, max_steps, Path(RUNS, run_name), seconds)
    finally:
        volume.commit()


@app.function(**CONTAINER, timeout=SCRIPT_SECONDS)
def use_checkpoint(script: str, model: str, run_name: str, words: list[str]) -> int:
    """Run a script on an archive of the bucket in a container; the script verifies it."""
    folder = Path(RUNS, run_name)
    folder.mkdir(parents=True, exist_ok=True)
    environment = container_environment(folder, os.environ)
    command = script_command(script, model, *words)
    try:
        return subprocess.call(command, cwd=folder, env=environment)  # noqa: S603 - no shell
    finally:
        volume.commit()


def find_files(store: Any, path: str) -> Iterator[Any]:
    """Yield the files at and below a path of the volume."""
    try:
        for entry in store.iterdir(f"/{path}", recursive=True):
            if entry.type.name == "FILE":
                yield entry
    except (FileNotFoundError, modal.exception.NotFoundError):
        refuse(f"{path or '/'} is not on the volume {VOLUME}.")


def put(store: Any, source: Path, target: str) -> int:
    """Copy a file or a directory to the volume; return the number of files."""
    if not source.exists():
        refuse(f"{source} does not exist.")
    with store.batch_upload(force=True) as batch:
        if source.is_dir():
            batch.put_directory(str(source), f"/{target}")
            return sum(path.is_file() for path in source.rglob("*"))
        batch.put_file(str(source), f"/{target}")
        return 1


def get(store: Any, path: str, folder: Path) -> int:
    """Copy a file, or what is below a directory, into a folder; return the number of files.

    Each is written under another name, compared in size and renamed.
    """
    count = 0
    for entry in find_files(store, path):
        name = volume_path(entry.path)
        below = PurePosixPath(name).relative_to(path) if name != path else PurePosixPath(name).name
        target = folder / below
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        with part.open("wb") as file:
            for block in store.read_file(f"/{name}"):
                file.write(block)
        if part.stat().st_size != entry.size:
            refuse(f"{name} came with {part.stat().st_size} of {entry.size} bytes: run it again.")
        part.replace(target)
        count += 1
    return count


def end(code: int) -> None:
    """End a command with the exit code of what it ran."""
    if code:
        raise SystemExit(code)


@app.local_entrypoint()
def upload(local_path: str, remote_path: str) -> None:
    """Copy a file or a directory to the volume."""
    count = put(volume, Path(local_path), volume_path(remote_path))
    print(f"{count} files are at {volume_path(remote_path)} of the volume {VOLUME}.")


@app.local_entrypoint()
def ls(path: str = "") -> None:
    """List the files at and below a path of the volume, with their sizes."""
    total = count = 0
    for entry in find_files(volume, volume_path(path)):
        print(f"{entry.size:>15,}  {ascii(entry.path)[1:-1]}")
        total, count = total + entry.size, count + 1
    print(f"{total:>15,}  bytes in {count} files")


@app.local_entrypoint()
def download(remote_path: str, local_path: str = ".") -> None:
    """Copy a file, or what is below a directory of the volume, into a local folder."""
    count = get(volume, volume_path(remote_path), Path(local_path))
    print(f"{count} files are in {local_path}.")


@app.local_entrypoint()
def delete(path: str, yes: bool = False) -> None:
    """Delete a file or a directory of the volume; asks unless --yes is said."""
    target = volume_path(path)
    if not target:
        refuse("--path must name what is to go: the whole volume does not.")
    count = sum(1 for _ in find_files(volume, target))
    if not yes:
        question = f"Delete {target} ({count} files) from the volume {VOLUME}? [y/N] "
        if not sys.stdin.isatty() or input(question).strip().lower() not in ("y", "yes"):
            refuse("nothing was deleted; give --yes.")
    volume.remove_file(f"/{target}", recursive=True)
    print(f"Deleted {target} ({count} files).")


@app.local_entrypoint()
def train(
    run_name: str,
    config: str = "tinystories",
    gpu: str = DEFAULT_GPU,
    max_steps: int = 0,
    data: str = "data",
    checkpoints: str = "checkpoints",
    wandb: bool = False,
    settings: str = "",
    hours: float = MAX_HOURS,
) -> None:
    """Train, or go on: --gpu H100:8 for several GPUs, --settings 'KEY=VALUE ...' for train.py."""
    least = 2 * RESERVE_SECONDS / 3600
    if not least <= hours <= MAX_HOURS:
        refuse(f"--hours of one attempt must be {least:g} to {MAX_HOURS:g}, got {hours:g}.")
    if max_steps < 0:
        refuse(f"--max-steps must be at least 1, got {max_steps}.")
    more = ['report_to=["tensorboard","wandb"]'] if wandb else []
    words = run_settings(
        config_word(config), data, checkpoints, run_name, [*more, *shlex.split(settings)]
    )
    function = train_on_gpu.with_options(
        gpu=gpu,
        cpu=CORES,
        memory=MEMORY_MIB,
        timeout=int(hours * 3600),
        secrets=find_secrets(data, checkpoints, wandb=wandb),
    )
    end(function.remote(words, max_steps, run_name, hours * 3600))


@app.local_entrypoint()
def generate(
    run_name: str,
    prompt: str,
    checkpoint: str = "latest",
    max_tokens: int = 100,
    temperature: float = 0.8,
    checkpoints: str = "checkpoints",
    gpu: str = DEFAULT_GPU,
) -> None:
    """Let a checkpoint write on."""
    words = ["--prompt", prompt, "--max-tokens", str(max_tokens), "--temperature", str(temperature)]
    run_on_checkpoint("generate", run_name, checkpoint, words, checkpoints, gpu)


@app.local_entrypoint()
def evaluate(
    run_name: str,
    checkpoint: str = "latest",
    options: str = "",
    checkpoints: str = "checkpoints",
    gpu: str = DEFAULT_GPU,
) -> None:
    """Evaluate a checkpoint; --options 'WORDS' go to scripts/evaluate.py."""
    run_on_checkpoint("evaluate", run_name, checkpoint, shlex.split(options), checkpoints, gpu)


@app.local_entrypoint()
def export(
    run_name: str,
    checkpoint: str = "latest",
    output: str = "",
    options: str = "",
    checkpoints: str = "checkpoints",
) -> None:
    """Export a checkpoint to exports/RUN of the volume, or to --output, a path of it or gs://."""
    words = ["--output", location(output or f"exports/{run_name}"), *shlex.split(options)]
    run_on_checkpoint("export_model", run_name, checkpoint, words, checkpoints, DEFAULT_GPU)


def run_on_checkpoint(
    script: str, run_name: str, checkpoint: str, words: list[str], checkpoints: str, gpu: str
) -> None:
    """Run a script of the project on a checkpoint of a run, in a container."""
    model = f"{location(checkpoints)}/{require_run_name(run_name)}/{checkpoint}"
    function = use_checkpoint.with_options(
        gpu=gpu, cpu=CORES, memory=MEMORY_MIB, secrets=find_secrets(checkpoints, *words)
    )
    end(function.remote(script, model, run_name, words))
