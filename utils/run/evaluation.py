"""Validation loss of the model as it is; changes neither its weights nor any random state.

The best one so far is kept by `TrainingProgress.add_validation` in `utils/training_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from utils.data_utils import ValidationData
from utils.training_utils import TrainState, forward_loss


def evaluate(
    state: TrainState,
    data: ValidationData,
    batch_size: int,
    document_end: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    show: Callable[[int], None] = lambda done: None,
) -> float | None:
    """Return the mean loss over the validation samples, over all ranks; None without samples.

    Every sample has the same number of predicted tokens, so the mean over samples is the mean over
    tokens. The model is in train mode afterwards, also after an error. `should_stop` is asked
    before each batch, on all ranks equally often, so that they may agree on the answer; once it
    says so, the evaluation ends with None. `show` is told before each batch how many samples all
    ranks have done.
    """
    if data.num_samples == 0:
        return None
    # The bare model: the forward of DDP talks to ranks that may have one batch less. That of a
    # sharded model does so in every layer: a rank without a batch takes part with one of no weight.
    accelerator, model = state.accelerator, state.loss_model
    total = torch.zeros((), dtype=torch.float64)
    empty = torch.zeros((1, data.sequence_length), dtype=torch.int64)
    batches = data.batches(batch_size, accelerator.process_index, accelerator.num_processes)
    samples_per_round = accelerator.num_processes * batch_size
    model.eval()
    try:
        with torch.no_grad():
            # The rounds of the rank with most samples; another one may have none in the last.
            for done in range(0, data.num_samples, samples_per_round):
                show(done)
                if should_stop is not None and should_stop():
                    return None
                found = next(batches, None)
                if found is None and state.division.has_whole_weights:
                    continue
                input_ids = empty if found is None else found
                input_ids = input_ids.to(accelerator.device, non_blocking=True)
                loss = forward_loss(model, input_ids, document_end)
                if found is not None:
                    total += loss.double().cpu() * len(input_ids)
    finally:
        model.train()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum")
    return float(total.item()) / data.num_samples
