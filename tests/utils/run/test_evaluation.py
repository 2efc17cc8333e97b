"""The validation loss: the mean over all samples at any number of ranks, and a stop in between."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.sample_shards import save_shards
from utils.data.shard_cache import ShardCache
from utils.data_utils import ValidationData
from utils.run.evaluation import evaluate
from utils.storage.directory import DirectoryBucket

LENGTH = 4


class MeanToken(nn.Module):
    """A model whose loss is the mean of its tokens and one, and that notes how it was called."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool, bool]] = []
        self.fails_at = fails_at

    def forward(self, input_ids: torch.Tensor, position_ids: None) -> torch.Tensor:
        if len(self.calls) == self.fails_at:
            raise RuntimeError("out of memory")
        self.calls.append((len(input_ids), self.training, torch.is_grad_enabled()))
        return input_ids.double().mean() + 1


def state_of(
    model: MeanToken, rank: int = 0, world_size: int = 1, *, is_sharded: bool = False
) -> Any:
    accelerator = SimpleNamespace(
        process_index=rank,
        num_processes=world_size,
        device=torch.device("cpu"),
        reduce=lambda tensor, how: tensor,
    )
    division = SimpleNamespace(has_whole_weights=not is_sharded)
    return SimpleNamespace(accelerator=accelerator, loss_model=model, division=division)


def open_data(directory: Path, num_samples: int) -> ValidationData:
    """Return samples of the tokens 0, 1, 2, ..."""
    shards = save_shards(directory / "data", [LENGTH * num_samples] if num_samples else [])
    bucket = DirectoryBucket(directory / "data")
    return ValidationData(
        ShardCache([(bucket, shards)], directory / "cache", 70_000), shards, LENGTH, None
    )


@pytest.mark.parametrize("num_samples", [1, 8, 13])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (4, 3)])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_all_ranks_ask_equally_often_and_their_losses_add_up_to_the_mean(
    tmp_path: Path, num_samples: int, world_size: int, batch_size: int, is_sharded: bool
) -> None:
    asked, total, seen = [0] * world_size, 0.0, 0
    shown: list[int] = []
    data = open_data(tmp_path, num_samples)
    for rank in range(world_size):
        model = MeanToken()

        def should_stop(rank: int = rank) -> bool:
            asked[rank] += 1
            return False

        loss = evaluate(
            state_of(model, rank, world_size, is_sharded=is_sharded),
            data,
            batch_size,
            should_stop=should_stop,
            show=shown.append,
        )
        assert loss is not None
        total += loss
        if is_sharded:  # no rank may be missing in a forward
            assert len(model.calls) == asked[rank]
        seen += sum(count for count, _, _ in model.calls)
        assert {(training, grad) for _, training, grad in model.calls} <= {(False, False)}
        assert model.training
    data.close()
    assert len(set(asked)) == 1
    assert shown == list(range(0, num_samples, world_size * batch_size)) * world_size
    assert asked[0] == -(-num_samples // (world_size * batch_size))
    assert seen == num_samples or (is_sharded and seen > num_samples)
    assert total == pytest.approx((LENGTH * num_samples - 1) / 2 + 1)


@pytest.mark.parametrize("batches_before", [0, 1, 2])
def test_a_stop_ends_the_evaluation_before_the_next_batch(
    tmp_path: Path, batches_before: int
) -> None:
    model, data = MeanToken(), open_data(tmp_path, 12)
    random_state = torch.get_rng_state()
    loss = evaluate(
        state_of(model), data, 4, should_stop=lambda: len(model.calls) == batches_before
    )
    data.close()
    assert loss is None
    assert len(model.calls) == batches_before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_model_is_in_train_mode_after_an_error(tmp_path: Path) -> None:
    model, data = MeanToken(fails_at=1), open_data(tmp_path, 12)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(state_of(model), data, 4)
    data.close()
    assert model.training


def test_without_samples_there_is_no_loss_and_nothing_is_asked(tmp_path: Path) -> None:
    model, data = MeanToken(), open_data(tmp_path, 0)
    assert evaluate(state_of(model), data, 4, should_stop=lambda: pytest.fail("asked")) is None
    data.close()
    assert model.calls == []
