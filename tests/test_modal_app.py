"""cloud/modal_app.py without an account: a stand-in for modal, directories for volumes; its real
package in a slow test."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import train
from configs.config_files import PROJECT_DIRECTORY
from scripts import evaluate, export_model, generate, upload_manager
from tests import stand_in_modal
from tests.processes import run_python
from utils.base.errors import ExitCode

FILE = PROJECT_DIRECTORY / "cloud" / "modal_app.py"


@pytest.fixture
def modal_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The app, with a directory as its volume, which is where containers mount it too."""
    monkeypatch.setitem(sys.modules, "modal", stand_in_modal.build_module())
    spec = importlib.util.spec_from_file_location("modal_app", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mounted = tmp_path / "volume"
    mounted.mkdir()
    module.volume.root = mounted
    module.MOUNT = str(mounted)  # type: ignore[attr-defined]
    module.RUNS = str(tmp_path / "runs")  # type: ignore[attr-defined]
    module.REMOTE_PROJECT = str(PROJECT_DIRECTORY)  # type: ignore[attr-defined]
    return module


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    (folder / "deep").mkdir(parents=True)
    (folder / "index.json").write_text("{}")
    (folder / "deep" / "a.npz").write_bytes(bytes(2500))
    return folder


def test_files_go_to_the_volume_and_come_back(
    modal_app: ModuleType, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modal_app.upload(str(local), "/data")
    modal_app.upload(str(local), "data")  # again: what is there is replaced
    modal_app.ls("data")
    out = capsys.readouterr().out
    assert "          2,500  data/deep/a.npz\n" in out
    assert out.endswith("          2,502  bytes in 2 files\n")
    modal_app.download("data", str(tmp_path / "back"))
    modal_app.download("data/deep/a.npz", str(tmp_path / "one"))
    assert (tmp_path / "back" / "deep" / "a.npz").read_bytes() == bytes(2500)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["deep", "index.json"]
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a.npz"]
    modal_app.delete("data/deep", yes=True)
    modal_app.ls()
    assert capsys.readouterr().out.endswith("              2  bytes in 1 files\n")


def test_nothing_is_deleted_unasked(
    modal_app: ModuleType, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modal_app.upload(str(local), "data")
    for words in ({"path": "data"}, {"path": "/", "yes": True}, {"path": "a/../..", "yes": True}):
        with pytest.raises(SystemExit) as ended:
            modal_app.delete(**words)
        assert ended.value.code == 2
    assert "give --yes" in capsys.readouterr().err
    assert (modal_app.volume.root / "data" / "deep" / "a.npz").exists()


def test_a_file_that_comes_short_is_no_file(
    modal_app: ModuleType, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modal_app.upload(str(local), "data")
    monkeypatch.setattr(stand_in_modal.Volume, "read_file", lambda self, path: iter([b"x"]))
    with pytest.raises(SystemExit):
        modal_app.download("data", str(tmp_path / "back"))
    assert not (tmp_path / "back" / "deep" / "a.npz").exists()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("upload", {"local_path": "nothing", "remote_path": "data"}, "does not exist"),
        ("ls", {"path": "nothing"}, "nothing is not on the volume"),
        ("download", {"remote_path": "nothing"}, "nothing is not on the volume"),
        ("train", {"run_name": "../up"}, "--run-name"),
        ("train", {"run_name": "a", "data": "../up"}, "no path on the volume"),
        ("train", {"run_name": "a", "data": "gs:/b/data"}, "a bucket is gs://BUCKET"),
        ("train", {"run_name": "a", "checkpoints": "GS://b/run"}, "a bucket is gs://BUCKET"),
        ("export", {"run_name": "a", "output": "s3://b/run"}, "a bucket is gs://BUCKET"),
        ("upload", {"local_path": ".", "remote_path": "gs://b"}, "a bucket is gs://BUCKET"),
        ("train", {"run_name": "a", "hours": 25.0}, "--hours"),
        ("train", {"run_name": "a", "hours": 0.1}, "--hours"),
        ("train", {"run_name": "a", "max_steps": -1}, "--max-steps"),
        ("train", {"run_name": "a", "config": "other.json"}, "no file of this project"),
    ],
)
def test_wrong_words_get_one_message_and_code_2(
    command: str,
    words: dict[str, Any],
    message: str,
    modal_app: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        getattr(modal_app, command)(**words)
    assert ended.value.code == ExitCode.USAGE
    assert message in capsys.readouterr().err
    assert modal_app.train_on_gpu.calls == []


def test_a_run_is_told_everything_by_its_command_line(modal_app: ModuleType) -> None:
    modal_app.train(
        "first",
        config=str(PROJECT_DIRECTORY / "configs" / "test.json"),
        gpu="A100-80GB:2",
        max_steps=7,
        wandb=True,
        settings='learning_rate=1e-3 "save_seconds=60"',
        hours=2.0,
    )
    ((options, words),) = modal_app.train_on_gpu.calls
    assert (options["gpu"], options["timeout"]) == ("A100-80GB:2", 7200)
    assert (options["cpu"], options["memory"]) == (modal_app.CORES, modal_app.MEMORY_MIB)
    assert [secret.name for secret in options["secrets"]] == [modal_app.WANDB_SECRET]
    settings, max_steps, run_name, seconds = words
    assert (run_name, seconds) == ("first", 7200)
    command = modal_app.train_command(settings, max_steps)
    assert command[:2] == ["bash", str(PROJECT_DIRECTORY / "cloud" / "node.sh")]
    config = train.load_config(train.parse_arguments(command[2:]))
    volume = modal_app.volume.root
    assert config.data_uri == f"{volume}/data"
    assert config.checkpoint_uri == f"{volume}/checkpoints"
    assert (config.run_name, config.max_steps, config.learning_rate) == ("first", 7, 1e-3)
    assert config.save_seconds == 60  # the user's word wins
    assert config.report_to == ["tensorboard", "wandb"]
    upload_manager.parse_arguments(["upload-all", *settings])


def test_gs_uris_stay_and_bring_their_secret(modal_app: ModuleType) -> None:
    modal_app.train("a", config="test", data="gs://b/data", checkpoints="gs://b/run")
    ((options, (settings, *_)),) = modal_app.train_on_gpu.calls
    assert [secret.name for secret in options["secrets"]] == [modal_app.GCS_SECRET]
    assert "data_uri=gs://b/data" in settings
    assert "checkpoint_uri=gs://b/run" in settings


def test_containers_have_gpu_time_volume_and_restarts(modal_app: ModuleType) -> None:
    options = modal_app.train_on_gpu.options
    assert options["gpu"] == "A10G"
    assert options["timeout"] == 24 * 3600
    assert options["retries"].max_retries == 10
    assert list(options["volumes"].values()) == [modal_app.volume]
    assert modal_app.volume.create_if_missing
    assert "retries" not in modal_app.use_checkpoint.options
    assert modal_app.GRACE_SECONDS + 3 < 30  # what is left is for the commit of the volume


def test_the_image_installs_the_pins_and_carries_the_code_but_no_data(
    modal_app: ModuleType,
) -> None:
    names = [name for name, _, _ in modal_app.image.steps]
    assert names[-1] == "add_local_dir"  # nothing may follow what is added at the start
    (command,) = next(words for name, words, _ in modal_app.image.steps if name == "run_commands")
    assert "--constraint /tmp/constraints.txt --requirement /tmp/requirements.txt" in command
    files = [words for name, words, _ in modal_app.image.steps if name == "add_local_file"]
    assert [Path(path).is_file() for path, _ in files] == [True, True]
    (folder, _), options = modal_app.image.steps[-1][1:]
    assert Path(folder) == PROJECT_DIRECTORY
    assert {".git", "venv*", "data", "bucket", "checkpoints/*", "tests"} <= set(options["ignore"])
    variables = next(words[0] for name, words, _ in modal_app.image.steps if name == "env")
    assert variables["PRETRAIN_VOLUME"] == modal_app.VOLUME


@pytest.mark.parametrize(
    ("code", "owed", "over"),
    [
        (0, None, 0),
        (2, None, 2),
        (3, None, 3),
        (4, 0, 0),
        (4, 4, None),
        (75, 0, None),
        (1, None, None),
        (137, None, None),
    ],
)
def test_modal_retries_what_a_restart_can_mend(
    code: int,
    owed: int | None,
    over: int | None,
    modal_app: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(modal_app, "run_until", lambda *words: code)
    monkeypatch.setattr(subprocess, "call", lambda words, **_: ran.append(words) or owed)
    if over is None:
        with pytest.raises(RuntimeError, match=f"code {code}"):
            modal_app.train_on_gpu.function([], 0, "a", 4000.0)
    else:
        assert modal_app.train_on_gpu.function([], 0, "a", 4000.0) == over
    assert len(ran) == (owed is not None)
    assert modal_app.volume.commits == 1


def wake(monkeypatch: pytest.MonkeyPatch, ready: Path, error: BaseException) -> list[int]:
    """End the first wait for a command with an error once it is ready; note what it is sent."""
    asked: list[int] = []

    class Process(subprocess.Popen[bytes]):
        waits = 0

        def wait(self, timeout: float | None = None) -> int:
            self.waits += 1
            if self.waits > 1:
                return super().wait(timeout)
            while not ready.exists():
                assert self.poll() is None
            raise error

        def send_signal(self, sig: int) -> None:
            asked.append(sig)
            super().send_signal(sig)

    monkeypatch.setattr(subprocess, "Popen", Process)
    return asked


PATIENT = """
trap 'read -t 0.5 <>fifo; echo saved >notes; exit 75' TERM
touch ready
while :; do read -t 0.1 <>fifo; done"""


@pytest.mark.parametrize("woken", [subprocess.TimeoutExpired("", 0.0), KeyboardInterrupt()])
def test_a_start_is_asked_to_save_once_and_waited_for(
    woken: BaseException, modal_app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is up, or Modal takes the container."""
    os.mkfifo(tmp_path / "fifo")
    asked = wake(monkeypatch, tmp_path / "ready", woken)
    command = ["bash", "-c", PATIENT]
    if isinstance(woken, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            modal_app.run_until(command, tmp_path, os.environ, 100.0)
    else:
        assert modal_app.run_until(command, tmp_path, os.environ, 100.0) == 75
    assert (tmp_path / "notes").read_text() == "saved\n"
    assert asked == [signal.SIGTERM]


def test_what_does_not_stop_leaves_no_rank_behind(
    modal_app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank in a session of its own, as node.sh starts them."""
    import psutil

    monkeypatch.setattr(modal_app, "GRACE_SECONDS", -3)
    script = "trap : TERM; setsid sleep 600 & echo $! >rank; touch ready; wait; wait; sleep 600"
    wake(monkeypatch, tmp_path / "ready", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        modal_app.run_until(["bash", "-c", script], tmp_path, os.environ, 100.0)
    rank = int((tmp_path / "rank").read_text())
    _, alive = psutil.wait_procs([psutil.Process(rank)] if psutil.pid_exists(rank) else [], 5)
    assert alive == []


def test_a_service_accounts_key_becomes_a_file_for_its_owner_alone(
    modal_app: ModuleType, tmp_path: Path
) -> None:
    found = modal_app.container_environment(tmp_path, {"SERVICE_ACCOUNT_JSON": "{}", "A": "b"})
    path = Path(found["GOOGLE_APPLICATION_CREDENTIALS"])
    assert path.read_text() == "{}"
    assert path.stat().st_mode & 0o077 == 0
    assert "SERVICE_ACCOUNT_JSON" not in found
    assert found["GRACE_SECONDS"] == str(modal_app.GRACE_SECONDS)
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in modal_app.container_environment(tmp_path, {})


def test_scripts_get_the_archive_in_the_bucket(
    modal_app: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: ran.append(command) or 0)
    modal_app.use_checkpoint.answer[0] = 0
    modal_app.generate("first", "Once", max_tokens=5)
    modal_app.evaluate("first", options="--json")
    modal_app.export("first")
    for _, words in modal_app.use_checkpoint.calls:
        for _ in range(2):  # a container may serve twice
            assert modal_app.use_checkpoint.function(*words) == 0
    scripts = ran[::2]
    assert {command[2] for command in scripts} == {f"{modal_app.MOUNT}/checkpoints/first/latest"}
    parsed = []
    for module, command in zip((generate, evaluate, export_model), scripts, strict=True):
        assert Path(command[1]).samefile(str(module.__file__))
        parsed.append(module.build_parser().parse_args(command[2:]))
    assert (parsed[0].prompt, parsed[0].max_tokens, parsed[0].temperature) == (["Once"], 5, 0.8)
    assert parsed[1].json
    assert parsed[2].output == f"{modal_app.MOUNT}/exports/first"


def test_the_exit_code_of_a_container_is_that_of_the_command(modal_app: ModuleType) -> None:
    modal_app.train_on_gpu.answer[0] = 3
    with pytest.raises(SystemExit) as ended:
        modal_app.train("a", config="test")
    assert ended.value.code == 3


CHECK = """
import inspect, json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2], sys.argv[3]]
import modal, modal_app
from modal import Function, Secret, Volume, exception, types
from tests import stand_in_modal as fake
def words(function):
    return set(inspect.signature(function).parameters) - {"self"}
pairs = [
    (Function.with_options, fake.Function.with_options), (Secret.from_name, fake.Secret.from_name),
    (Volume.iterdir, fake.Volume.iterdir), (Volume.read_file, fake.Volume.read_file),
    (Volume.remove_file, fake.Volume.remove_file), (Volume.commit, fake.Volume.commit),
    (Volume.batch_upload, fake.Volume.batch_upload),
]
strange = {str(real): sorted(words(made) - words(real)) for real, made in pairs}
assert {"FILE", "DIRECTORY"} <= set(types.FileEntryType.__members__)
assert set(types.FileEntry.__dataclass_fields__) >= {"path", "type", "size"}
assert issubclass(exception.NotFoundError, Exception)
functions = {name: getattr(modal_app, name) for name in ("train_on_gpu", "use_checkpoint")}
assert all(isinstance(one, modal.Function) for one in functions.values())
train = modal_app.train_on_gpu
changed = train.with_options(gpu="H100:2", cpu=4.0, memory=16384, timeout=60, secrets=[])
infos = [one.info() for one in (train, changed, modal_app.use_checkpoint)]
print(json.dumps({
    "strange": {key: value for key, value in strange.items() if value},
    "infos": [[one.gpus, one.timeout, one.max_retries, list(one.volumes)] for one in infos],
}))
"""


@pytest.mark.slow
def test_the_real_package_takes_the_app(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    result = subprocess.run([*install, "modal>=1.5"], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"modal cannot be installed: {result.stderr.strip().splitlines()[-1:]}")
    paths = [str(packages), str(FILE.parent), str(PROJECT_DIRECTORY)]
    found = run_python("-W", "ignore", "-c", CHECK, *paths)
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert facts["strange"] == {}
    assert facts["infos"] == [
        [[["A10G", 1]], 24 * 3600, 10, ["/volume"]],
        [[["H100", 2]], 60, 10, ["/volume"]],
        [[["A10G", 1]], 4 * 3600, None, ["/volume"]],
    ]
