"""Every wrong input gives one clear ConfigError; every right one gives the value that was meant."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.config_changes import compare_configs
from configs.config_files import PROJECT_DIRECTORY, parse_assignment
from configs.training_config import TrainingConfig, get_training_config
from utils.base.errors import ConfigError, ExitCode

KEYS = [item.name for item in fields(TrainingConfig)]


def load(directory: Path, text: str | bytes, **overrides: Any) -> TrainingConfig:
    path = directory / "run.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return get_training_config(str(path), overrides)


def test_shipped_test_configuration_holds_the_users_values() -> None:
    config = get_training_config("test")
    assert config == get_training_config()
    assert (config.max_files, config.max_steps) == (5, 100)
    assert (config.save_steps, config.logging_steps) == (50, 10)
    assert (config.model, config.sequence_length) == ("neox-tiny", 512)
    assert config.per_device_train_batch_size == 1
    assert config.resolve_batch(1) == (4, 4)
    assert config.resolve_batch(2) == (4, 2)
    assert config.data_uri == str(PROJECT_DIRECTORY / "bucket/data")


def test_shipped_production_configuration_holds_the_users_values() -> None:
    config = get_training_config("production")
    assert (config.max_files, config.file_limit) == (-1, None)
    assert (config.max_steps, config.save_steps, config.logging_steps) == (10000, 500, 100)
    assert (config.model, config.sequence_length) == ("refocused-1.2b", 2048)
    assert config.per_device_train_batch_size == 4
    assert config.learning_rate == 2e-4
    assert config.warmup_steps == 100
    assert config.data_uri == "gs://refocused-ai/tokenized_data"
    assert config.checkpoint_uri == "gs://refocused-ai"
    assert config.upload_transport == "gsutil"


@pytest.mark.parametrize("name", ["prodution", "nowhere.json", "", "."])
def test_a_missing_file_lists_the_known_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*production, speedrun, test") as caught:
        get_training_config(name)
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_key_that_was_removed_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(tmp_path, '{"machine_type": "gcp/a2-highgpu-8g", "max_steps": 7}')
    assert config.max_steps == 7
    assert "run.json: machine_type is ignored: prices are no longer looked up" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"max_stepz": 1}', "unknown key 'max_stepz'. Did you mean max_steps?"),
        ('{"max_train_files": 5}', "unknown key 'max_train_files'. Did you mean max_files?"),
        ('{"model.num_layers": 3}', "Did you mean model_overrides.num_hidden_layers?"),
        (
            '{"run_name": "a", "checkpoint_uri": "gs://"}',
            "checkpoint_uri gs://: give gs://bucket/prefix or a directory.",
        ),
        ('{"batch_size": 4}', "Did you mean per_device_train_batch_size?"),
        ('{"vocab_size": 3}', "Did you mean model_overrides.vocab_size?"),
        ('{"qqq": 4}', "unknown key 'qqq'. Known keys:"),
        ('{"model_override.hidden_size": 4}', "Did you mean model_overrides?"),
        ('{"max_steps": "10"}', 'max_steps must be a whole number, got "10".'),
        ('{"max_steps": true}', "max_steps must be a whole number, got true."),
        ('{"max_files": "all"}', 'max_files must be a whole number or null, got "all".'),
        ('{"learning_rate": "2e-4"}', 'learning_rate must be a number, got "2e-4".'),
        ('{"gradient_checkpointing": 1}', "gradient_checkpointing must be true or false, got 1."),
        ('{"bf16": "yes"}', "bf16 must be true or false or null"),
        ('{"report_to": "wandb"}', "report_to must be a list of strings"),
        ('{"report_to": ["mlflow"]}', "report_to must hold only tensorboard, wandb; got 'mlflow'."),
        ('{"model_overrides": []}', "model_overrides must be an object, got []."),
        ('{"max_steps": 0}', "max_steps must be at least 1, got 0."),
        ('{"sequence_length": 1}', "sequence_length must be at least 2, got 1."),
        ('{"max_files": 0}', "max_files must be at least 1, or null or -1 for all; got 0."),
        ('{"warmup_steps": -1}', "warmup_steps must be at least 0, got -1."),
        ('{"seed": 9223372036854775808}', "seed must be between 0 and 9223372036854775807"),
        ('{"learning_rate": 0}', "learning_rate must be above 0, got 0.0."),
        ('{"hourly_price": -1}', "hourly_price must be between 0 and 1000000000.0, got -1"),
        ('{"min_lr_rate": 1.1}', "min_lr_rate must be between 0.0 and 1.0, got 1.1."),
        ('{"muon_momentum": 1}', "muon_momentum must be at least 0.0 and below 1.0, got 1."),
        ('{"muon_learning_rate": 0}', "muon_learning_rate must be above 0, got 0."),
        ('{"optim": "sgd"}', "adamw_torch_fused, adamw_bnb_8bit, adafactor, muon; got 'sgd'."),
        ('{"adam_beta1": 1}', "adam_beta1 must be at least 0.0 and below 1.0, got 1.0."),
        ('{"learning_rate": Infinity}', "learning_rate must be above 0, got inf."),
        ('{"weight_decay": NaN}', "weight_decay must be at least 0, got nan."),
        ('{"max_grad_norm": Infinity}', "max_grad_norm must be at least 0, got inf."),
        ('{"max_steps": NaN}', "max_steps must be a whole number, got NaN."),
        ('{"model_overrides": {"a": NaN}}', "model_overrides.a must be a finite number, got nan."),
        ('{"learning_rate": 1' + "0" * 400 + "}", "learning_rate must be a number, got 1000"),
        ('{"lr_scheduler_type": "cosin"}', "must be one of cosine, linear, constant, const"),
        (
            '{"lr_scheduler_kwargs": {"power": 2}}',
            "lr_scheduler_kwargs of cosine are num_cycles; g",
        ),
        (
            '{"lr_scheduler_type": "cosine_with_min_lr", '
            '"lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0}}',
            "min_lr and min_lr_rate are both set",
        ),
        (
            '{"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '
            '{"num_decay_steps": 1, "decay_type": "sqrt"}}',
            "decay_type must be one of linear, cosine, 1-sqrt; got 'sqrt'",
        ),
        ('{"lr_scheduler_type": "warmup_stable_decay"}', "needs lr_scheduler_kwargs.num_decay_st"),
        (
            '{"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}',
            "lr_scheduler_kwargs.power must be above 0, got 'x'.",
        ),
        (
            '{"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 2e-4}}',
            "lr_scheduler_kwargs.lr_end must be at least 0 and below learning_rate 0.0002, got 0.0",
        ),
        (
            '{"lr_scheduler_type": "cosine_with_min_lr", '
            '"lr_scheduler_kwargs": {"min_lr_rate": 2}}',
            "lr_scheduler_kwargs.min_lr_rate must be between 0 and 1, got 2.",
        ),
        (
            '{"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '
            '{"num_decay_steps": 0.2}}',
            "num_decay_steps must be a whole number above 0, got 0.2.",
        ),
        ('{"log_level": "INFO"}', "log_level must be one of debug, info, warning, error; got"),
        ('{"bf16": true, "fp16": true}', "bf16 and fp16 are both true: choose one."),
        (
            '{"global_batch_size": 6, "gradient_accumulation_steps": 4}',
            "global_batch_size 6 is no multiple of "
            "per_device_train_batch_size x gradient_accumulation_steps = 4.",
        ),
        ("", "not valid JSON"),
        ('{"max_steps": 1, "max_steps": 2}', "the key 'max_steps' is there twice"),
        ('{"model_overrides": {"a": 1, "a": 1}}', "the key 'a' is there twice"),
        ('{"output_dir": "a\\u0000b"}', "output_dir holds a NUL character"),
        ('{"max_steps": 10', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"max_steps": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "it holds no JSON object."),
        (b"\xff\xfe{}", "cannot be read"),
    ],
)
def test_a_wrong_file_gives_one_error_that_names_it(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'run.json'}: ")


def test_an_error_names_the_source_of_the_value(tmp_path: Path) -> None:
    for key, value in [("max_steps", 0), ("max_steps", "x"), ("max_step", 1)]:
        with pytest.raises(ConfigError, match=r"^command line: "):
            load(tmp_path, '{"max_steps": 3}', **{key: value})
    with pytest.raises(ConfigError, match=r"run\.json: save_steps"):
        load(tmp_path, '{"save_steps": 0}', max_steps=5)


def test_a_shipped_file_is_named_relative_to_the_project() -> None:
    with pytest.raises(ConfigError, match=r"^configs/test\.json: global_batch_size 4 "):
        get_training_config("test", {"gradient_accumulation_steps": 3})


@pytest.mark.parametrize(("text", "limit"), [("null", None), ("-1", None), ("1", 1), ("7", 7)])
def test_max_files_is_a_number_or_all(tmp_path: Path, text: str, limit: int | None) -> None:
    assert load(tmp_path, f'{{"max_files": {text}}}').file_limit == limit


def test_the_command_line_wins_and_model_overrides_are_merged(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        '{"max_steps": 3, "model_overrides": {"hidden_size": 64, "vocab_size": 100}}',
        **{"max_steps": 5, "model_overrides.vocab_size": 200, "model_overrides.rotary_pct": 0.5},
        **{"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs.power": 2},
    )
    assert config.lr_scheduler_kwargs == {"power": 2}
    assert config.max_steps == 5
    assert config.model_overrides == {"hidden_size": 64, "vocab_size": 200, "rotary_pct": 0.5}


def write_files(folder: Path, **contents: object) -> None:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_file_begins_from_another_one(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_files(
        tmp_path / "deep",
        mine={
            "base": "../wide.json",
            "max_steps": 7,
            "model_overrides.num_hidden_layers": 2,
            "lr_scheduler_kwargs": {},
        },
    )
    write_files(
        tmp_path,
        wide={
            "base": "production",
            "max_steps": 5,
            "save_steps": 3,
            "model_overrides": {"hidden_size": 64, "vocab_size": 100},
            "lr_scheduler_kwargs": {"power": 2},
        },
        wider={"base": "wide.json", "model_overrides": {"vocab_size": 200}},
    )
    config = get_training_config(str(tmp_path / "deep/mine.json"), {"warmup_steps": 1})
    assert config == replace(
        get_training_config("production"),
        max_steps=7,
        save_steps=3,
        warmup_steps=1,
        model_overrides={"hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 2},
    )
    polynomial = {"lr_scheduler_type": "polynomial"}
    wider = get_training_config(str(tmp_path / "wider.json"), polynomial)
    assert wider.model_overrides == {"hidden_size": 64, "vocab_size": 200}


@pytest.mark.parametrize(
    ("mine", "base", "message"),
    [
        ({"base": "base.json"}, {"max_stepz": 1}, "base.json: unknown key 'max_stepz'."),
        ({"base": "base.json"}, {"max_steps": 0}, "base.json: max_steps must be at least 1"),
        ({"base": "base.json", "max_steps": 0}, {"max_steps": 5}, "mine.json: max_steps must"),
        (
            {"base": "base.json", "model_overrides": {"b": 1}},
            {"model_overrides": {"a": math.inf}},
            "base.json: model_overrides.a must be a finite number",
        ),
        (
            {"base": "base.json"},
            {"data_uri": [{"uri": "a", "weight": 0}]},
            "base.json: data_uri: the weight of a",
        ),
        ({"base": "base.json"}, {"base": "base.json"}, "base.json: base base.json leads back to "),
        ({"base": "base.json"}, {"base": "mine.json"}, "base.json: base mine.json leads back to "),
        ({"base": "nothing.json"}, {}, "mine.json: base nothing.json: "),
        ({"base": "prodution"}, {}, "json does not exist. Did you mean production? Known names"),
        ({"base": 5}, {}, "mine.json: base must be a string, got 5."),
    ],
)
def test_a_mistake_in_a_base_names_its_file(
    tmp_path: Path, mine: object, base: object, message: str
) -> None:
    write_files(tmp_path, mine=mine, base=base)
    with pytest.raises(ConfigError) as caught:
        get_training_config(str(tmp_path / "mine.json"))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_whole_numbers_are_taken_where_a_number_is_meant(tmp_path: Path) -> None:
    config = load(tmp_path, '{"learning_rate": 1}')
    assert (type(config.learning_rate), config.learning_rate) == (float, 1.0)


def test_the_project_placeholder_is_replaced_wherever_it_comes_from(tmp_path: Path) -> None:
    config = load(tmp_path, '{"data_uri": "{project}/a"}', checkpoint_uri="{project}/b")
    assert config.data_uri == f"{PROJECT_DIRECTORY}/a"
    assert config.checkpoint_uri == f"{PROJECT_DIRECTORY}/b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_steps=10", ("max_steps", 10)),
        ("learning_rate=1e-3", ("learning_rate", 1e-3)),
        ("bf16=true", ("bf16", True)),
        ("max_files=null", ("max_files", None)),
        ("data_uri=gs://bucket/a=b", ("data_uri", "gs://bucket/a=b")),
        ('run_name="5"', ("run_name", "5")),
        ("run_name=", ("run_name", "")),
        ('report_to=["wandb"]', ("report_to", ["wandb"])),
        (" model_overrides.hidden_size =64", ("model_overrides.hidden_size", 64)),
        ("run_name=" + "[" * 100_000, ("run_name", "[" * 100_000)),
    ],
)
def test_assignments_are_read_as_json_or_else_as_text(
    text: str, expected: tuple[str, object]
) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["max_steps", "", "=5", " =5"])
def test_an_assignment_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="use key=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("micro", "accumulation", "total", "world_size", "expected"),
    [
        (4, None, None, 1, (4, 1)),
        (4, 3, None, 2, (24, 3)),
        (1, None, 4, 1, (4, 4)),
        (1, None, 4, 4, (4, 1)),
        (2, 3, 12, 2, (12, 3)),
        (1, None, 4, 3, "global_batch_size 4 is no multiple of .* 1 x 3 ranks"),
        (1, None, 4, 8, "global_batch_size 4 is no multiple of .* 1 x 8 ranks"),
        (3, None, 4, 1, "global_batch_size 4 is no multiple of .* 3 x 1 ranks"),
        (1, 4, 4, 2, "needs gradient_accumulation_steps 2, not 4"),
    ],
)
def test_a_step_has_the_asked_samples_at_any_world_size_or_is_refused(
    micro: int, accumulation: int | None, total: int | None, world_size: int, expected: object
) -> None:
    config = TrainingConfig(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=total,
    )
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            config.resolve_batch(world_size)
    else:
        assert config.resolve_batch(world_size) == expected


def test_a_configuration_survives_json() -> None:
    config = get_training_config("test", {"model_overrides.hidden_size": 64, "bf16": False})
    assert TrainingConfig(**json.loads(json.dumps(config.to_json()))) == config


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), -1, 0, 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), value=JSON_VALUES)
def test_any_json_value_gives_a_usable_configuration_or_names_its_key(
    key: str, value: object
) -> None:
    try:
        config = get_training_config("production", {key: value})
    except ConfigError as exc:
        assert key in str(exc)  # noqa: PT017
        return
    kept = getattr(config, key)
    assert not isinstance(kept, float) or math.isfinite(kept)
    assert config.resolve_batch(1)[0] >= 1


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample_prompts"):
        TrainingConfig(sample_prompts=["The", "\ud800x"])


def test_a_guarded_key_that_a_checkpoint_does_not_know_had_its_default() -> None:
    config = get_training_config("test", {"pad_vocab_to_multiple_of": 64, "tf32": True})
    known = config.to_json()
    old = {k: v for k, v in known.items() if k not in ("pad_vocab_to_multiple_of", "fp8", "tf32")}
    changes = compare_configs(old, config)
    assert changes.guarded == {"pad_vocab_to_multiple_of": "null -> 64"}
    assert changes.free == {}
    assert compare_configs({**old, "gone": 1}, get_training_config("test")).guarded == {}


GUARDED = """
model model_overrides init_from sequence_length learning_rate lr_scheduler_type lr_scheduler_kwargs
min_lr_rate warmup_steps optim muon_learning_rate muon_momentum weight_decay adam_beta1 adam_beta2
adam_epsilon max_grad_norm seed shuffle_window_shards mask_documents max_files bf16 fp16 fp8
pad_vocab_to_multiple_of
"""


def test_a_change_of_what_is_trained_is_guarded() -> None:
    config = TrainingConfig()
    changes = compare_configs({**dict.fromkeys(KEYS, "other"), "max_steps": 1}, config)
    assert set(changes.guarded) == set(GUARDED.split())
    assert changes.guarded["seed"] == '"other" -> 42'
    assert changes.free["max_steps"] == "1 -> 10000"
    assert compare_configs({"max_steps": 10001}, config).guarded == {"max_steps": "10001 -> 10000"}
