"""Configuration keys as options of a command line: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from configs.training_config import get_training_config
from scripts import evaluate, prove_resume
from utils.command_line import arguments, run_config


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("--learning_rate", "1e-3"), "learning_rate", 1e-3),
        (("--learning-rate", "1e-3"), "learning_rate", 1e-3),
        (("--learning-rate=1e-3",), "learning_rate", 1e-3),
        (("--max_files", "-1"), "max_files", -1),
        (("--run-name", "5"), "run_name", "5"),
        (("--run-name=--a=b",), "run_name", "--a=b"),
        (("--bf16", "true"), "bf16", True),
        (("--set", "bf16=False"), "bf16", False),
        (("--gradient-checkpointing", "--quiet"), "gradient_checkpointing", True),
        (("--report_to", "wandb"), "report_to", ["wandb"]),
        (("--model_overrides.hidden_size", "64"), "model_overrides", {"hidden_size": 64}),
        (("--model-overrides.hidden-size=64",), "model_overrides", {"hidden_size": 64}),
        (("--seed", "1", "--set", "seed=2"), "seed", 2),
        # The own options of train.py win.
        (("--max-steps", "7", "--max_steps", "5"), "max_steps", 7),
        (("--hourly-price", "1.5"), "hourly_price", 1.5),
    ],
)
def test_a_key_is_an_option_of_train_py(words: tuple[str, ...], key: str, value: object) -> None:
    config = run_config.load_config(arguments.parse_arguments([*words]))
    assert config == get_training_config("test", {key: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--learning-rat", "1"), "unknown option --learning-rat. Did you mean --learning_rate?"),
        (("--max-step=5",), "unknown option --max-step. Did you mean --max-steps?"),
        (("speedrun",), "unrecognized argument speedrun. Did you mean --config speedrun?"),
        (("--resum", "latest"), "unknown option --resum. Did you mean --resume?"),
        (("--batch-size", "4"), "Did you mean --per_device_train_batch_size?"),
        (("--num-layers", "4"), "Did you mean --model_overrides.num_hidden_layers?"),
        (("--qqq",), "unknown option --qqq. --help lists the options, docs/CONFIGURATION.md the"),
        (("--learning_rate", "--quiet"), "--learning_rate needs a value."),
    ],
)
def test_a_wrong_option_suggests_the_nearest_one(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.parse_arguments([*words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_key_is_an_option_of_commands_that_train_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = prove_resume.parse_arguments(["--save_format", "bin", "--steps", "50"])
    assert (args.set, args.steps) == (["save_format=bin"], 50)
    with pytest.raises(SystemExit):  # it would have no effect there
        evaluate.main(["latest", "--sequence_length", "16"])
    assert "unrecognized arguments: --sequence_length" in capsys.readouterr().err
