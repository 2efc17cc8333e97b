"""How the state is divided: what is asked for, and by whom; what would be ignored is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from configs.config_files import PROJECT_DIRECTORY
from configs.training_config import TrainingConfig
from utils.base.errors import ConfigError
from utils.training.sharding import (
    DEEPSPEED_FILE,
    FSDP2_FILE,
    Sharding,
    deepspeed_hidden,
    resolve_sharding,
)

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ZERO = "ACCELERATE_DEEPSPEED_"


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        ({}, {}, None),
        ({"sharding": "fsdp2"}, {}, Sharding(True, "sharding=fsdp2")),
        (
            {"sharding": "fsdp2", "reshard_after_forward": False},
            {},
            Sharding(False, "sharding=fsdp2"),
        ),
        ({}, FSDP2, Sharding(True, "accelerate launch")),
        ({"sharding": "zero1"}, {}, Sharding(False, "sharding=zero1", zero_stage=1)),
        ({"sharding": "zero2"}, {}, Sharding(False, "sharding=zero2", zero_stage=2)),
        ({}, DEEPSPEED, Sharding(False, "accelerate launch", zero_stage=2)),
        (
            {"sharding": "fsdp2"},
            {**DEEPSPEED, f"{ZERO}ZERO_STAGE": "1"},
            Sharding(False, "accelerate launch", zero_stage=1),
        ),
        (
            {"sharding": "fsdp2"},
            {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"},
            Sharding(False, "accelerate launch"),
        ),
        ({}, {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, None),
    ],
)
def test_what_is_asked_for(
    settings: dict[str, object], environment: dict[str, str], expected: Sharding | None
) -> None:
    config = TrainingConfig(**settings)  # type: ignore[arg-type]
    assert resolve_sharding(config, 2, environment) == expected
    assert resolve_sharding(config, 1, environment) is None  # nothing to share


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**DEEPSPEED, f"{ZERO}ZERO_STAGE": "3"}, "zero_stage 3 is not supported: configs/acc"),
        ({**DEEPSPEED, f"{ZERO}ZERO_STAGE": "0"}, "zero_stage must be 1 or 2, got 0"),
        ({**DEEPSPEED, f"{ZERO}CONFIG_FILE": "ds.json"}, "deepspeed_config_file is not read"),
        ({**DEEPSPEED, f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offloading with DeepSpeed"),
        ({**DEEPSPEED, f"{ZERO}OFFLOAD_PARAM_DEVICE": "nvme"}, "offloading with DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP of version 1 is not supported"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--set gradient_checkpointing=true"),
    ],
)
def test_what_would_be_ignored_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_sharding(TrainingConfig(), 1, environment)


def test_parts_are_safetensors() -> None:
    config = TrainingConfig(sharding="fsdp2", save_format="bin")
    with pytest.raises(ConfigError, match="save_format must be safetensors"):
        resolve_sharding(config, 2, {})


def test_an_optimizer_that_needs_whole_tensors_is_refused_where_ranks_share_them() -> None:
    refused = [("zero2", "muon", "none or fsdp2,"), ("zero1", "adafactor", "none,")]
    refused += [("fsdp2", "adamw_bnb_8bit", "none,")]
    for sharding, optim, advice in [*refused, ("fsdp2", "adafactor", "none,")]:
        config = TrainingConfig(sharding=sharding, optim=optim)
        with pytest.raises(ConfigError, match=f"optim={optim}, .* Use sharding={advice}"):
            resolve_sharding(config, 2, {})
        assert resolve_sharding(config, 1, {}) is None
    assert resolve_sharding(TrainingConfig(sharding="fsdp2", optim="muon"), 2, {})


@pytest.mark.parametrize(("file", "zero_stage"), [(FSDP2_FILE, 0), (DEEPSPEED_FILE, 2)])
def test_accelerates_configuration_asks_for_it(
    file: str, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(PROJECT_DIRECTORY / file)
    words = ["--config_file", path, "--num_processes", "2", str(Path("train.py"))]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # it wants GPUs for both
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""  # what launch_command does
    if zero_stage:
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    expected = Sharding(not zero_stage, "accelerate launch", zero_stage=zero_stage)
    assert resolve_sharding(TrainingConfig(), 2, environment) == expected


def test_an_accelerator_does_not_see_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with deepspeed_hidden():
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
