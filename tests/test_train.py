"""train.py as a user runs it: exact, resumable, readable by stock tools, honest about failure."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shlex
import shutil
import socket
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.config_files import PROJECT_DIRECTORY
from configs.model_config import build_model_config
from configs.training_config import TrainingConfig, get_training_config
from tests.conftest import TINY, call_train
from tests.processes import run_python
from tests.small_models import training_state
from utils import training_utils
from utils.base.errors import ConfigError, ExitCode, StorageError
from utils.base.startup import keep_compiled
from utils.checkpoints.layout import find_checkpoints, read_json, read_manifest
from utils.checkpoints.views import read_local_checkpoint
from utils.start import preflight
from utils.tools.viewer.report import summarize
from utils.tracking.metrics_log import read_metrics

Train = Callable[..., int]
TRAIN = PROJECT_DIRECTORY / "train.py"
LAST = "checkpoint-epoch0-step10-files0"


def checkpoint(tmp_path: Path, folder: str, name: str = LAST) -> Path:
    return tmp_path / folder / "checkpoints" / name


def load(path: Path) -> Any:
    from accelerate.utils import load as load_tensors

    return load_tensors(path)


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Name everything in which two nested values differ, bit by bit."""
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and np.array_equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        return [d for key in left for d in differences(left[key], right[key], f"{where}/{key}")]
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    else:
        same = left == right
    return [] if same else [where]


def state_differences(left: Path, right: Path) -> list[str]:
    """Name all that training depends on in which two checkpoints differ, bit by bit."""
    weights = [load_file(path / "model.safetensors") for path in (left, right)]
    found = differences(*weights)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        one, other = load(left / name), load(right / name)
        found += differences(one, other, name)
    return found


@pytest.fixture
def goes_on(trained_run: Path, tmp_path: Path) -> Path:
    """The folder `run` with a copy of the trained run and its bucket, to go on from."""
    folder = Path(shutil.copytree(trained_run, tmp_path / "run"))
    journal = folder / "checkpoints" / "uploads.jsonl"  # names the bucket by its whole path
    journal.write_text(journal.read_text("utf-8").replace(str(trained_run), str(folder)))
    return folder


def test_watching_more_often_leaves_the_weights_bit_identical(
    run_train: Train, tmp_path: Path
) -> None:
    dropout = "model_overrides.hidden_dropout=0.1"
    rare = ("logging_steps=10", "save_steps=10", dropout)
    often = ("logging_steps=1", "save_steps=2", "eval_steps=1", dropout)
    assert run_train("--max-steps", "10", folder="rare", settings=rare) == 0
    assert run_train("--max-steps", "10", folder="often", settings=often) == 0
    assert not state_differences(checkpoint(tmp_path, "rare"), checkpoint(tmp_path, "often"))


@pytest.mark.parametrize(
    "words",
    [
        "--set save_format=safetensors",
        "--set save_format=bin",
        "--config speedrun --set run_name=",  # with Muon
        "--set optim=adafactor",
    ],
)
def test_stock_loaders_read_a_checkpoint(
    run_train: Train, tmp_path: Path, sample_data: Path, words: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run_train("--max-steps", "10", *words.split()) == 0
    directory = checkpoint(tmp_path, "run")
    saved = AutoModelForCausalLM.from_pretrained(directory)
    page = (PROJECT_DIRECTORY / "docs/CHECKPOINTS.md").read_text("utf-8")
    lines = textwrap.dedent(page.split("```python")[1].split("```")[0])
    lines = lines.replace("checkpoints/checkpoint-epoch0-step100-files0", str(directory))
    (tmp_path / "lines.py").write_text(lines.replace("Accelerator()", "Accelerator(cpu=True)"))
    model, optimizer, _ = runpy.run_path(str(tmp_path / "lines.py"))["prepared"]
    assert not differences(dict(model.state_dict()), dict(saved.state_dict()))
    assert not differences(optimizer.state_dict(), load(directory / "optimizer.bin"))

    tokens = np.load(sample_data / "val_00000.npz")["input_ids"].astype(np.int64)
    rows = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)
    samples = torch.from_numpy(rows[[len(rows) * part // 12 for part in (1, 3, 5, 7, 9, 11)]])
    with torch.no_grad():
        loss = saved(input_ids=samples, labels=samples).loss.item()
    metrics = read_json(directory / "metadata.json")["validation_metrics"]
    assert loss == pytest.approx(metrics["validation_loss"], abs=1e-5)
    text = "The with statement"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_three_steps_equal_three_of_a_plain_pytorch_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.models.building import build_model

    # The very same products.
    monkeypatch.setattr("utils.models.cpu_products.is_onednn_faster", lambda: False)
    settings = {
        "model_overrides.num_hidden_layers": 2,
        "use_cpu": True,
        "max_grad_norm": 0.5,
        "loss_implementation": "model",
        "adam_beta1": 0.8,  # seen from the second step on
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,  # a gradient of nearly 0 is rounding alone
        "learning_rate": 1e-4,
        "warmup_steps": 2,
        "max_steps": 6,
    }
    config = get_training_config("test", settings)
    model_config = build_model_config(config.model, config.model_overrides)
    generator = torch.Generator().manual_seed(1)
    steps = [
        [torch.randint(0, 4096, (1, 64), generator=generator) for _ in range(4)] for _ in range(3)
    ]

    training_utils.set_determinism(config)
    plain = build_model(model_config, config)
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    others = [p for p in plain.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    losses = []
    # Half the peak, the peak, then a quarter of a cosine from 1 to 0.1.
    for batches, rate in zip(steps, (5e-5, 1e-4, 0.8681981e-4), strict=True):
        optimizer.zero_grad()
        for batch in batches:
            loss = plain(input_ids=batch, labels=batch).loss
            losses.append(loss.item())
            (loss / len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    gradients = {name: p.grad.clone() for name, p in plain.named_parameters()}

    with training_state(settings) as state:
        kept: dict[str, torch.Tensor] = {}
        state.optimizer.register_step_pre_hook(
            lambda *_: kept.update(
                {name: p.grad.clone() for name, p in state.core_model.named_parameters()}
            )
        )
        for batches in steps:
            training_utils.train_step(state, batches, config.max_grad_norm)
    assert state.interval.tolist() == pytest.approx([sum(losses) / 4, 3.0], abs=1e-5)
    assert state.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(kept[name], gradients[name], rtol=0, atol=1e-6)
        ours = dict(state.core_model.named_parameters())[name]
        torch.testing.assert_close(ours, parameter, rtol=0, atol=1e-6)


def test_a_micro_batch_that_is_found_trains_as_the_same_one_given_by_hand(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "utils.start.micro_batch._fits",
        lambda facts, free: facts.config.per_device_train_batch_size <= 2,
    )
    settings = ("global_batch_size=8", "gradient_accumulation_steps=null")
    for folder, size in (("found", "auto"), ("given", "2")):
        words = (*settings, f"per_device_train_batch_size={size}")
        assert run_train("--max-steps", "3", folder=folder, settings=words) == 0
    found, given = (checkpoint(tmp_path, f, LAST.replace("10", "3")) for f in ("found", "given"))
    assert read_json(found / "training_config.json")["per_device_train_batch_size"] == 2
    assert not state_differences(found, given)


def train_on_ranks(
    folder: Path, count: int, *words: str, settings: Sequence[str] = (), program: Path = TRAIN
) -> str:
    """Call train.py, or a file in its place, under torchrun; return what it wrote."""
    folder.mkdir(exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    options = [f"--set={setting}" for setting in (*TINY, *settings)]
    result = run_python(*torchrun, program, *words, *options, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_two_ranks_follow_the_curve_of_one(
    run_train: Train, tmp_path: Path, sample_data: Path
) -> None:
    settings = ("logging_steps=1", "save_steps=4", "record_batches=true", "sample_tokens=4")
    assert run_train("--max-steps", "8", folder="one", settings=settings) == 0
    given = (f"data_uri={sample_data}", *settings)
    train_on_ranks(tmp_path / "two", 2, "--max-steps", "8", settings=given)
    logs = [tmp_path / folder / "logs" for folder in ("one", "two")]
    one, two = (
        [json.loads(line)["crc32c"] for line in (log / "batches.jsonl").read_text().splitlines()]
        for log in logs
    )
    assert one == two
    # The main process alone writes texts and curves.
    one, two = (len((log / "samples.jsonl").read_text().splitlines()) for log in logs)
    assert one == two > 0
    (board,) = (path for path in logs[1].iterdir() if path.is_dir())
    assert len(list(board.iterdir())) == 1
    for key in ("loss", "validation_loss", "grad_norm"):
        one, two = (
            read_metrics(tmp_path / folder / "logs/metrics.jsonl").series(key)
            for folder in ("one", "two")
        )
        assert one[0] == two[0]
        np.testing.assert_allclose(one[1], two[1], rtol=0, atol=1e-4)
    saved = tmp_path / "two/checkpoints/checkpoint-epoch0-step8-files0"
    assert read_manifest(saved).world_size == 2
    assert {p.name for p in saved.glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    # One process goes on from what two have written.
    assert run_train("--max-steps", "9", "--resume", "latest", folder="two", settings=settings) == 0


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ((), ("max_step=3",), "unknown key 'max_step'. Did you mean max_steps?"),
        ((), ("max_steps=-4",), "max_steps must be at least 1, got -4"),
        (("--config", "nope.json"), (), "nope.json does not exist"),
        ((), ("model_overrides.hidden_sise=3",), "Did you mean hidden_size?"),
        ((), ("model_overrides.vocab_size=100",), "vocabulary of 512, the model has 100"),
        ((), ("data_uri=/nonexistent",), "data_uri /nonexistent does not exist"),
        ((), ("fp16=true",), "fp16 needs a CUDA GPU"),
        ((), ("global_batch_size=3", "per_device_train_batch_size=2"), "no multiple of"),
        (("--resume", "best"), (), "There is no checkpoint 'best'"),
        ((), ("use_cpu=true", "attn_implementation=flex_attention"), "trains on a CUDA GPU only"),
        (("--set", "max_steps"), (), "--set max_steps: use key=value"),
        (("--json",), (), "--json is for --dry-run"),
    ],
)
def test_bad_input_is_one_clear_message_exit_2_and_nothing_written(
    run_train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    settings: tuple[str, ...],
    message: str,
) -> None:
    if torch.cuda.is_available() and "fp16=true" in settings:
        pytest.skip("this machine has a CUDA GPU")
    assert run_train(*words, settings=settings) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_a_new_best_and_the_clock_can_ask_for_a_save(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("save_steps=100", "eval_steps=2", "keep_checkpoints=9", "checkpoint_uri=")
    best = (*settings, "save_on_best=true")
    assert run_train("--max-steps", "5", folder="best", settings=best) == 0
    saved = [name.step for name in find_checkpoints(tmp_path / "best/checkpoints")]
    losses = read_metrics(tmp_path / "best/logs/metrics.jsonl").series("validation_loss")
    expected, lowest = [], np.inf
    for step, loss in zip(*losses, strict=True):
        if loss < lowest or step == 5:
            expected.append(step)
        lowest = min(lowest, loss)
    assert saved == expected
    assert len(saved) > 1

    clock = iter(range(0, 10_000, 4))  # each look at it is 4 s later
    fake = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr("utils.run.saving.time", fake)
    timed = (*settings, "save_seconds=8")
    assert run_train("--max-steps", "6", folder="timed", settings=timed) == 0
    saved = [name.step for name in find_checkpoints(tmp_path / "timed/checkpoints")]
    assert saved == [2, 4, 6]


def test_what_is_advised_beside_an_old_run_is_not_refused(
    run_train: Train, goes_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--max-steps", "6", "--dry-run", "--quiet")
    for kind in (words, words[:2]):
        assert run_train(*kind) == 2
        told = capsys.readouterr()
        assert (told.out + told.err).count("checkpoints already holds checkpoints up to") == 1
        # A dry run shows what it was asked for first, and its own archives are no other run's.
        assert told.out.startswith("Preflight\n") == ("--dry-run" in kind)
        assert "another run" not in told.out + told.err
    assert "--fresh and another checkpoint_uri (their archives stay in bucket)" in told.err
    assert run_train(*words, "--fresh") == 3
    assert run_train(*words, "--fresh", settings=("checkpoint_uri=other",)) == 0
    for way in (("--resume", "latest"), ("--run-name", "other")):
        assert run_train(*words, *way) == 0
    (goes_on / "mydata").mkdir()
    assert run_train(*words, settings=("data_uri=mydta", "run_name=other")) == 2
    told = capsys.readouterr().err
    assert "data_uri mydta does not exist. Did you mean mydata?" in told
    assert "prepare_data.py --input TEXTS --output mydta" in told


def test_a_configuration_that_trains_something_else_wants_a_flag(
    run_train: Train, goes_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--resume", "latest", "--max-steps")
    for steps, change, message in [
        ("6", "learning_rate=1e-3", "learning_rate: 0.004 -> 0.001"),
        ("6", "lr_scheduler_type=linear", 'lr_scheduler_type: "cosine" -> "linear"'),
        ("6", "model_overrides.hidden_dropout=0.1", "model_overrides: "),
        ("6", "optim=muon", 'optim: "adamw_torch_fused" -> "muon"'),
        ("6", "global_batch_size=8", "samples a step: 4 -> 8 (global_batch_size=4 keeps it)"),
    ]:
        assert run_train(*words, steps, "--dry-run", settings=(change,)) == 2
        refused = capsys.readouterr().err
        assert message in refused
        assert "--accept-config-change" in refused
    assert run_train(*words, steps, settings=(change,)) == 2
    assert capsys.readouterr().err == refused
    change = "lr_scheduler_type=linear"
    assert run_train(*words, "6", "--accept-config-change", settings=(change,)) == 0
    last = checkpoint(goes_on.parent, "run", "checkpoint-epoch0-step6-files0")
    (rate, *_) = {group["lr"] for group in load(last / "optimizer.bin")["param_groups"]}
    assert rate == pytest.approx(0.1 * 4e-3)  # where the new schedule ends


def test_another_optimizer_that_is_accepted_begins_anew(
    run_train: Train, goes_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--resume", "latest", "--accept-config-change", "--max-steps")
    old = "adamw_torch_fused"
    for steps, optim in (("6", "muon"), ("8", "adafactor"), ("10", "adamw_torch_fused")):
        settings = (f"optim={optim}", "muon_learning_rate=0.02")
        assert run_train(*words, steps, settings=settings) == 0
        assert f"has the state of {old}: {optim} begins anew." in capsys.readouterr().out
        last = f"checkpoint-epoch0-step{steps}-files0"
        saved = load(checkpoint(goes_on.parent, "run", last) / "optimizer.bin")
        rates = [group["lr"] for group in saved["param_groups"]]  # a tenth: where the schedule ends
        assert rates == pytest.approx([4e-4, 4e-4] + [2e-3] * (optim == "muon"))
        kept = {key for values in saved["state"].values() for key in values}
        assert ("momentum_buffer" in kept) == (optim == "muon")
        assert ("exp_avg_sq_row" in kept) == (optim == "adafactor")
        counts = {int(values["step"]) for values in saved["state"].values() if "step" in values}
        assert counts == {2}
        old = optim


def test_a_longer_run_and_other_watching_want_no_flag_and_are_listed(
    run_train: Train, goes_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = find_checkpoints(goes_on / "checkpoints")
    # Nothing is left to do, also where the file or the words have less than the run has done.
    assert run_train("--max-steps", "3", "--resume", "latest", "--dry-run") == 0
    dry = capsys.readouterr().out
    assert run_train("--max-steps", "3", "--resume", "latest") == 0
    for told in (dry, capsys.readouterr().out):
        assert "This run has reached its end, step 4: max_steps=3 changes nothing." in told
        assert "done already: step 4 of 4" in told
    assert "Done: step 4 of 4." in told
    assert read_json(goes_on / "checkpoints/run.json")["config"]["max_steps"] == 4
    assert run_train("--max-steps", "4", "--resume", "latest") == 0
    assert find_checkpoints(goes_on / "checkpoints") == before
    settings = ("logging_steps=1", "keep_checkpoints=5")
    finished = capsys.readouterr().out
    assert run_train("--max-steps", "6", "--resume", "latest", settings=settings) == 0
    output = capsys.readouterr().out
    for change in ("max_steps: 4 -> 6", "logging_steps: 10 -> 1", "keep_checkpoints: 3 -> 5"):
        assert f"Changed since the checkpoint: {change}." in output
    assert "To train on to step 8:" in finished
    assert "--resume latest --max-steps 8" in finished
    assert not [line for line in finished.splitlines() if "learning rate" in line]
    (line,) = [line for line in output.splitlines() if "learning rate" in line]
    assert " WARNING " in line
    assert "after step 4 is 9.27e-04 where it would have been 4.00e-04" in line


def test_the_advice_at_a_jump_of_the_learning_rate_keeps_it(
    run_train: Train, goes_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("learning_rate=0.0004", "lr_scheduler_type=constant", "save_steps=6")
    words = ("--max-steps", "6", "--resume", "latest", "--accept-config-change")
    assert run_train(*words, settings=settings) == 0
    assert "learning rate" not in capsys.readouterr().out
    last = checkpoint(goes_on.parent, "run", "checkpoint-epoch0-step6-files0")
    assert {group["lr"] for group in load(last / "optimizer.bin")["param_groups"]} == {4e-4}


def test_epochs_are_the_steps_that_the_data_make_of_them(
    run_train: Train,
    sample_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ("num_train_epochs=0.002", "lr_scheduler_type=linear", "report_to=[]")
    assert run_train(settings=settings) == ExitCode.USAGE  # the file has max_steps
    assert "num_train_epochs and max_steps are both set" in capsys.readouterr().err
    settings += ("max_steps=-1",)
    assert run_train("--stop-after", "4", settings=settings) == 0
    capsys.readouterr()
    assert run_train("--resume", "latest", settings=settings) == 0
    longer = shlex.split(capsys.readouterr().out.splitlines()[-1])
    index = read_json(sample_data / "index.json")
    shards = [shard for shard in index["shards"] if not shard["name"].startswith("val_")]
    samples = sum(shard["tokens"] for shard in shards) // 32
    steps = math.ceil(0.002 * samples / 4)
    assert steps > 4
    assert [name.step for name in find_checkpoints(tmp_path / "run/checkpoints")] == [4, steps]
    last = checkpoint(tmp_path, "run", f"checkpoint-epoch0-step{steps}-files0")
    metadata = read_json(last / "metadata.json")
    assert metadata["training_progress"]["max_steps"] == steps
    assert run_train("--resume", "4", settings=(*settings, "num_train_epochs=0.001")) == 2
    told = capsys.readouterr().err
    assert f"max_steps: {steps} -> " in told
    assert f". Restore it (--max-steps {steps}), " in told
    # The printed command says the length once, and goes on as it stands.
    assert longer[-4:] == ["--set", "num_train_epochs=null", "--max-steps", str(2 * steps)]
    assert "max_steps=-1" not in longer
    monkeypatch.chdir(tmp_path / "run")
    assert call_train([*longer[2:], "--dry-run", "--config", "test"]) == 0

    lengths = [
        (config.max_steps, config.num_train_epochs)
        for typed in ({}, {"max_steps": 9}, {"num_train_epochs": 1.0})
        for config in [get_training_config(str(last), typed)]
    ]
    assert lengths == [(steps, 0.002), (9, None), (TrainingConfig().max_steps, 1.0)]


def test_a_decay_may_begin_at_a_stable_checkpoint(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stable(decay_steps: int, *more: str) -> tuple[str, ...]:
        kwargs = f'lr_scheduler_kwargs={{"num_decay_steps": {decay_steps}}}'
        muon = ("optim=muon", "muon_learning_rate=0.01", "save_steps=2")
        return (kwargs, "lr_scheduler_type=warmup_stable_decay", *muon, *more)

    words = ("--max-steps", "9", "--stop-after", "6")
    assert run_train(*words, settings=stable(2)) == 0
    capsys.readouterr()
    # At step 6 a decay over 4 steps to step 8 would have begun.
    refused = ("--resume", "latest", "--max-steps", "8")
    assert run_train(*refused, settings=stable(4)) == ExitCode.USAGE
    assert "max_steps: 9 -> 8" in capsys.readouterr().err
    words = ("--resume", "4", "--max-steps", "8")
    assert run_train(*words, settings=stable(4, "logging_steps=1")) == 0
    assert "max_steps: 9 -> 8" in capsys.readouterr().out
    last = checkpoint(tmp_path, "run", "checkpoint-epoch0-step8-files0")
    assert read_manifest(last).branch == 1
    rates = read_json(last / "metadata.json")["learning_rates"][-4:]
    assert rates == pytest.approx([0.004 * share for share in (0.868198, 0.55, 0.231802, 0.1)])

    # After it the rate would jump: the advice keeps it, of both optimizers.
    words = ("--resume", "8", "--max-steps", "20", "--stop-after", "10")
    capsys.readouterr()
    assert run_train(*words, settings=stable(4)) == 0
    (advice,) = re.findall(r"To keep the old rate: (.*)\.$", capsys.readouterr().out, re.MULTILINE)
    kept = [word for word in shlex.split(advice) if "=" in word]
    assert run_train(*words, "--accept-config-change", settings=stable(4, *kept)) == 0
    last = checkpoint(tmp_path, "run", "checkpoint-epoch0-step10-files0")
    groups = load(last / "optimizer.bin")["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([4e-4, 4e-4, 1e-3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_validation_loss_that_is_not_finite_is_told_and_never_the_best(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: float,
) -> None:
    losses = iter([bad, 5.0, bad])
    monkeypatch.setattr("utils.run.evaluation.evaluate", lambda *_: next(losses))
    settings = ("save_steps=2", "eval_steps=2", "keep_checkpoints=9", "save_on_best=true")
    assert run_train("--max-steps", "6", settings=settings) == 0
    captured = capsys.readouterr()
    assert "Logging error" not in captured.err
    assert f"loss {bad:.4f}" in captured.out
    assert "best none yet" in captured.out
    assert captured.out.count("it is never the best") == 2
    best = [
        read_json(
            checkpoint(tmp_path, "run", f"checkpoint-epoch0-step{step}-files0/metadata.json")
        )["validation_metrics"]["best_validation_loss"]
        for step in (2, 4, 6)
    ]
    assert best == [None, 5.0, 5.0]


def test_what_a_predecessor_uploads_during_the_checks_is_resumed_and_not_refused(
    run_train: Train,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read_data = preflight.read_data

    def read_slowly(config: TrainingConfig) -> Any:
        shutil.copytree(trained_run / "bucket", tmp_path / "run/bucket")
        return read_data(config)

    monkeypatch.setattr(preflight, "read_data", read_slowly)
    words = ("--max-steps", "4", "--resume", "latest")
    assert run_train(*words, settings=("save_steps=2", "report_to=[]")) == 0
    output = capsys.readouterr().out
    assert "Resumed from checkpoints/checkpoint-epoch0-step4-files0 (step 4)." in output
    assert "run        done already: step 4 of 4, " in output


def test_every_checkpoint_is_in_the_bucket_and_old_ones_leave_this_machine(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("save_steps=2", "keep_checkpoints=2")
    assert run_train("--max-steps", "10", "--no-background-upload", settings=settings) == 0
    bucket = tmp_path / "run" / "bucket" / "Checkpoints"
    steps = {2, 4, 6, 8, 10}
    for suffix in (".tar.gz", ".json"):
        found = {p.name for p in bucket.iterdir() if p.name.endswith(suffix)}
        assert found == {f"checkpoint-epoch0-step{s}-files0{suffix}" for s in steps}
    kept = {name.step for name in find_checkpoints(tmp_path / "run/checkpoints")}
    assert {8, 10} <= kept
    assert len(kept) <= 3
    assert not list((tmp_path / "run/checkpoints").glob("*.tar.gz"))
    lines = capsys.readouterr().out
    for word in ("Saving", "Queued", "Uploading", "Verified", "Cleaned up"):
        assert sum(word in line and "step6" in line for line in lines.splitlines()) <= 1
        assert f"{word}" in lines


def test_an_upload_that_fails_is_exit_4_and_the_checkpoint_is_kept(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("quota exceeded")

    monkeypatch.setattr("utils.uploads.uploader.run_in_process", refuse)
    assert run_train("--max-steps", "2") == ExitCode.NOT_VERIFIED
    output = capsys.readouterr().out
    assert "quota exceeded" in output
    assert "upload_manager.py upload-all" in output
    assert [name.step for name in find_checkpoints(tmp_path / "run/checkpoints")] == [2]
    monkeypatch.undo()
    # The next start finishes what is owed.
    assert run_train("--max-steps", "2", "--resume", "latest") == 0
    bucket = tmp_path / "run/bucket/Checkpoints"
    assert (bucket / "checkpoint-epoch0-step2-files0.tar.gz").is_file()


def test_verified_in_another_bucket_is_not_verified_in_this_one(
    run_train: Train, goes_on: Path
) -> None:
    settings = ("save_steps=2", "keep_checkpoints=1", "max_eval_samples=1")
    words = ("--max-steps", "6", "--resume", "latest")
    assert run_train(*words, settings=(*settings, "checkpoint_uri=elsewhere")) == 0
    # What this machine still had is brought to the new bucket too, before it may go.
    here = {str(name) for name in find_checkpoints(goes_on / "checkpoints")}
    there = {path.name for path in (goes_on / "elsewhere/Checkpoints").iterdir()}
    assert {f"{name}.tar.gz" for name in here} <= there
    assert "checkpoint-epoch0-step4-files0.tar.gz" in there


def test_a_branch_uploads_its_own_files_under_a_name_that_was_verified_before(
    run_train: Train, goes_on: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("save_steps=2", "keep_checkpoints=9")
    # A crash between the commit of the branch's step 4 and its queueing.
    monkeypatch.setattr("utils.uploads.uploader.Uploader.submit", lambda self, checkpoint: None)
    assert run_train("--max-steps", "4", "--resume", "2", settings=settings) == 0
    monkeypatch.undo()
    assert run_train("--max-steps", "4", "--resume", "latest", settings=settings) == 0
    name = "checkpoint-epoch0-step4-files0"
    sidecar = read_json(goes_on / "bucket/Checkpoints" / f"{name}.json")
    assert sidecar["manifest"] == read_json(goes_on / "checkpoints" / name / "manifest.json")
    assert sidecar["manifest"]["branch"] == 1


def test_a_refused_start_leaves_the_folder_as_it_was(
    run_train: Train, goes_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = str(goes_on / "checkpoints" / "checkpoint-epoch0-step2-files0")
    before = sorted(goes_on.rglob("*"))
    settings = ["learning_rate=1", "run_name=new", "torch_compile=false"]
    assert run_train("--resume", saved, folder="run", settings=settings) == 2  # held, logged
    for change in ("learning_rate=1", "cache_limit_bytes=10"):
        assert run_train("--max-steps", "4", "--resume", "2", settings=(change,)) == 2
    assert sorted(goes_on.rglob("*")) == before
    assert run_train("--resume", saved, folder="new", settings=settings) == 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert run_train(folder="new") == ExitCode.PREFLIGHT  # the bucket was tried
    assert run_train("--dry-run", folder="new") == ExitCode.PREFLIGHT
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_while_saving_is_one_message_and_leaves_nothing(
    run_train: Train,
    goes_on: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: unexpected pos")

    monkeypatch.setattr("torch.save", full)
    settings = ("background_save=false",)
    assert run_train("--max-steps", "6", "--resume", "latest", settings=settings) == 1
    errors = capsys.readouterr().err
    assert "step6" in errors
    assert "could not be saved" in errors
    assert "iB free in" in errors
    assert not list((goes_on / "checkpoints").glob(".saving-*"))
    assert [name.step for name in find_checkpoints(goes_on / "checkpoints")] == [2, 4]


def test_a_bucket_prefix_of_another_run_is_refused_before_training(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = f"checkpoint_uri={tmp_path / 'shared'}"
    assert run_train("--max-steps", "1", folder="first", settings=(shared,)) == 0
    assert run_train("--max-steps", "1", folder="second", settings=(shared,)) == ExitCode.PREFLIGHT
    assert "--set run_name=NAME" in capsys.readouterr().err
    assert run_train("--max-steps", "1", folder="second", settings=(shared, "run_name=second")) == 0


def test_preflight_gives_all_reasons_at_once(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("in the way")
    usage = type("Usage", (), {"free": 1000, "total": 10, "used": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    settings = (f"checkpoint_uri={blocked}", "use_cpu=true")
    assert run_train(settings=settings) == ExitCode.PREFLIGHT
    errors = capsys.readouterr().err
    for reason in ("memory:", "disk:", "upload:"):
        assert reason in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dry_run_prints_the_run_and_writes_no_checkpoint(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train("--dry-run", "--max-steps", "50") == 0
    output = capsys.readouterr().out
    title, _, *lines = output[output.index("Preflight") :].splitlines()
    rows = [line.split()[:2] for line in lines if line.startswith("  ")]
    assert title == "Preflight"
    assert "{" not in output
    names = (
        "settings",
        "data",
        "tokens",
        "vocabulary",
        "memory",
        "saving",
        "disk",
        "cache",
        "upload",
        "step",
        "run",
        "uploading",
        "cost",
    )
    assert [name for name, _ in rows] == list(names)
    # Other processes of this machine may make the step's a warning.
    assert {status for name, status in rows if name != "step"} == {"ok"}
    for word in ("parameters", "tokens per parameter", "128 tokens", "6,400 tokens in all", "KiB"):
        assert word in output
    assert run_train("--dry-run", "--json", "--max-steps", "50") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["max_steps"] == 50
    assert "6,400 tokens in all" in shown["run"]["run"]
    assert [check["name"] for check in shown["checks"]] == list(names)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "logs").exists()


def test_training_connects_to_nothing(run_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run_train("--max-steps", "2") == 0


@pytest.mark.slow
@pytest.mark.filterwarnings(  # torch's own compiler; as errors they would end the compilation
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
def test_torch_compile_gives_the_same_curve_and_is_kept_in_the_cache_directory(
    run_train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ("logging_steps=1",)
    assert run_train("--max-steps", "3", folder="eager", settings=settings) == 0
    # transformers, which is loaded by now, has chosen a folder of its own.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(training_utils, "use_cpu_products", lambda model: False)
    settings += ("torch_compile=true",)
    assert run_train("--max-steps", "3", folder="compiled", settings=settings) == 0
    assert "Compiled in " in capsys.readouterr().out
    curves = [
        read_metrics(tmp_path / folder / "logs/metrics.jsonl").series("loss")[1]
        for folder in ("eager", "compiled")
    ]
    np.testing.assert_allclose(*curves, rtol=0, atol=1e-5)
    saved = tmp_path / "compiled/checkpoints/checkpoint-epoch0-step3-files0/model.safetensors"
    assert not [name for name in load_file(saved) if "_orig_mod" in name]
    assert any((tmp_path / "compiled/cache/torch_compile").rglob("*.so"))


def test_the_folder_of_what_is_compiled_is_the_users_or_in_cache_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = get_training_config("test", {"cache_dir": str(tmp_path / "a b")})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    keep_compiled(Path(config.cache_dir))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled(Path(config.cache_dir))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a b/torch_compile")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/compiled"))
    with pytest.raises(ConfigError, match="file/compiled: Not a directory. Set cache_dir"):
        keep_compiled(Path(config.cache_dir))


def test_metadata_holds_what_the_viewer_shows(run_train: Train, tmp_path: Path) -> None:
    assert run_train("--max-steps", "10", settings=("logging_steps=2", "save_steps=5")) == 0
    metadata = read_json(checkpoint(tmp_path, "run") / "metadata.json")
    assert metadata["step"] == 10
    assert metadata["epoch"] == 0
    assert len(metadata["loss_history"]) == len(metadata["learning_rates"]) == 5
    assert metadata["current_loss"] == metadata["loss_history"][-1]
    assert metadata["best_loss"] == min(metadata["loss_history"])
    metrics = metadata["validation_metrics"]
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["validation_loss"]))
    assert metrics["best_validation_loss"] <= metrics["validation_loss"]
    progress = metadata["training_progress"]
    assert progress["tokens_seen"] == 10 * 4 * 32
    assert progress["completed_steps"] == 10
    assert metadata["system_info"]["mixed_precision"] == "no"
    assert metadata["timestamp"].endswith("+00:00")
    history = read_json(checkpoint(tmp_path, "run") / "training_metrics.json")
    assert history["steps"] == [2, 4, 6, 8, 10]
    json.dumps(metadata)


def test_a_checkpoint_between_two_log_lines_has_its_own_figures(
    run_train: Train, tmp_path: Path
) -> None:
    """The next attempt logs the same as without the save."""
    for folder, every, stop in (("often", 1, 8), ("run", 4, 6), ("run", 4, 8)):
        words = ("--max-steps", "10", "--stop-after", str(stop), "--resume", "latest")
        assert run_train(*words, folder=folder, settings=(f"logging_steps={every}",)) == 0
    own, logged = (
        {one["step"]: one for one in read_metrics(path).records if "loss" in one}
        for path in sorted(tmp_path.glob("*/logs/metrics.jsonl"))
    )
    mean = {last: np.mean([own[step]["loss"] for step in range(5, last + 1)]) for last in (6, 8)}
    for step in (6, 8):
        path = checkpoint(tmp_path, "run", f"checkpoint-epoch0-step{step}-files0")
        row = summarize(read_local_checkpoint(path))
        assert row["current_loss"] == pytest.approx(mean[step], rel=1e-6)
        assert row["learning_rate"] == own[step]["learning_rate"]
        assert row["tokens_per_second"] not in (None, logged[4]["tokens_per_second"])
    for key in ("current_loss", "tokens_per_second"):
        assert row[key] == logged[8][key.removeprefix("current_")]


def test_a_loss_that_was_measured_at_another_step_is_not_a_checkpoints(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.run.run import TrainingRun

    evaluate = TrainingRun.evaluate

    def at_5_only(run: Any) -> bool:
        return evaluate(run) if run.state.progress.step == 5 else False

    monkeypatch.setattr(TrainingRun, "evaluate", at_5_only)
    assert run_train("--max-steps", "10", settings=("save_steps=5",)) == 0
    names = ("checkpoint-epoch0-step5-files0", LAST)
    metrics = [
        read_json(checkpoint(tmp_path, "run", name) / "metadata.json")["validation_metrics"]
        for name in names
    ]
    assert metrics[0]["validation_loss"] == metrics[1]["best_validation_loss"]
    assert metrics[1]["validation_loss"] is metrics[1]["perplexity"] is None
