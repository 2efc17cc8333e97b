"""What preflight says of data, model and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.model_config import build_model_config
from configs.training_config import TrainingConfig
from utils.base.errors import DataError
from utils.data.shard_index import DataSource, ShardFacts, ShardIndex
from utils.models.building import ParameterCounts
from utils.models.estimates import MemoryEstimate
from utils.start import machine_checks
from utils.start.data_checks import check_tokens, check_vocabulary, require_vocabulary
from utils.start.facts import RunFacts
from utils.start.machine_checks import (
    check_cache,
    check_disk,
    check_folders,
    check_memory,
    find_free_memory,
)
from utils.start.preflight import check_settings

CPU = torch.device("cpu")
GIB = 2**30


def source_of(tokens: int, vocab_size: int | None = None) -> DataSource:
    shard = ShardFacts("train_0.npz", tokens, 1, None)
    return DataSource("data", 1.0, ShardIndex((shard,), (), vocab_size))


def facts_of(parameters: int, available: int = 1, **settings: Any) -> RunFacts:
    config, model = TrainingConfig(**settings), build_model_config("neox-tiny")
    counts = ParameterCounts(parameters, 0)
    return RunFacts(config, model, counts, "no", CPU, 1, 0, [source_of(available)])


@pytest.mark.parametrize(
    ("parameters", "available", "steps", "status", "text"),
    [
        (10**7, 10**9, 2 * 10**6, "ok", "0.2 epochs; 20 tokens per parameter"),
        (10**7, 10**9, 10**5, "warn", "Far too few for this model: raise max_steps"),
        (10**7, 4 * 10**6, 10**5, "warn", "2.5 epochs; 1 tokens per parameter"),
        (10**7, 4 * 10**6, 10**5, "warn", "Far too few for this model: add text"),
        (10**6, 10**9, 21, "ok", "2.1e-06 epochs; 0.0021 tokens per parameter"),
        (10**6, 10**6, 5 * 10**4, "warn", "Beyond 4 epochs a model learns little; add text"),
    ],
)
def test_tokens_are_compared_with_the_data_and_the_model(
    parameters: int, available: int, steps: int, status: str, text: str
) -> None:
    check = check_tokens(facts_of(parameters, available, sequence_length=100, max_steps=steps))
    assert (check.status, text in check.message) == (status, True), check.message


@pytest.mark.parametrize(
    ("sizes", "status"), [((512,), "ok"), ((256,), "ok"), ((255,), "warn"), ((255, None), "ok")]
)
def test_a_vocabulary_that_the_data_hardly_use_is_told(
    sizes: tuple[int | None, ...], status: str
) -> None:
    model = build_model_config("neox-tiny", {"vocab_size": 512})
    check = check_vocabulary([source_of(1, size) for size in sizes], model)
    advice = "model_overrides.vocab_size=255" in check.message
    assert (check.status, advice) == (status, status == "warn"), check.message


@pytest.mark.parametrize(
    ("init_from", "advice"),
    [("", "Set model_overrides.vocab_size=600"), ("a/b", "with the tokenizer of a/b")],
)
def test_ids_that_the_model_does_not_know_are_refused(init_from: str, advice: str) -> None:
    model = build_model_config("neox-tiny", {"vocab_size": 512}, None, 1000)  # 488 only pad it
    require_vocabulary([source_of(1, 512)], model, init_from)
    with pytest.raises(DataError, match=f"of 600, the model has 512.*{advice}"):
        require_vocabulary([source_of(1, 600)], model, init_from)


@pytest.mark.parametrize(("max_steps", "status"), [(11, "ok"), (10, "warn"), (3, "warn")])
def test_a_run_that_ends_within_its_warm_up_is_told(max_steps: int, status: str) -> None:
    check = check_settings(facts_of(1, max_steps=max_steps, warmup_steps=10))
    assert (check.status, "still rising" in check.message) == (status, status == "warn")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_decay_steps": 10}, None),
        ({"num_decay_steps": 11}, "21 steps, max_steps is 20"),
        ({"num_decay_steps": 4, "num_stable_steps": 6}, None),
        ({"num_decay_steps": 4, "num_stable_steps": 5}, "19 steps, max_steps is 20"),
    ],
)
def test_a_schedule_whose_parts_are_another_length_than_the_run_is_told(
    settings: dict[str, int], found: str | None
) -> None:
    kind = "warmup_stable_decay"
    values = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings, "warmup_steps": 10}
    check = check_settings(facts_of(1, max_steps=20, **values))
    assert check.status == ("warn" if found else "ok")
    assert (found or "valid") in check.message


@pytest.mark.parametrize(
    ("ratio", "status"), [(None, "ok"), (1.1, "ok"), (0.5, "ok"), (1.5, "fail")]
)
def test_a_small_step_that_takes_more_than_the_formula_says_is_believed(
    ratio: float | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "available_memory", lambda: 10 * GIB)
    need = MemoryEstimate(GIB, GIB, 0, GIB, GIB, total=8 * GIB)
    assert check_memory(TrainingConfig(), need, CPU, ratio).status == status


def test_ranks_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "available_memory", lambda: 10 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    free, where = find_free_memory(CPU)
    assert free == 5 * GIB
    assert "for each of 2 ranks" in where


def test_a_folder_that_cannot_be_written_is_named_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocked = tmp_path / "a-file"
    blocked.touch()
    keys = ("output_dir", "logging_dir", "cache_dir")
    for key in keys:
        config = TrainingConfig(**{key: str(blocked)}, run_name="run")
        (check,) = check_folders(config)
        assert (check.name, check.status) == ("disk", "fail")
        assert (
            check.message == f"{blocked} cannot be written: Not a directory. Set {key} elsewhere."
        )
    assert check_folders(TrainingConfig()) == []
    assert list(tmp_path.iterdir()) == [blocked]


@pytest.mark.parametrize(("free", "status"), [(2 * 5000 + 1, "ok"), (2 * 5000, "fail")])
def test_a_window_of_shards_must_fit_into_the_cache_s_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    config = TrainingConfig(cache_dir=str(tmp_path))
    check = check_cache(config, [source_of(5000)], 512)
    assert (check.name, check.status) == ("cache", status)


def test_a_limit_on_the_size_of_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (1000, 1000))
    check = check_disk(facts_of(10**6, output_dir=str(tmp_path)), None)
    assert check.status == "fail"
    assert "`ulimit -f` allows 1000 B" in check.message
