"""Validation loss of the model as it is; changes neither its weights nor any random state."""

from __future__ import annotations

import torch

from utils.data_utils import ValidationData
from utils.training_utils import TrainState, forward_loss


def evaluate(
    state: TrainState, data: ValidationData, batch_size: int, document_end: int | None = None
) -> float | None:
    """Return the mean loss over the validation samples, over all ranks; None without samples.

    Every sample has the same number of predicted tokens, so the mean over samples is the mean
    over tokens.
    """
    if data.num_samples == 0:
        return None
    # The bare model: a wrapper's forward may talk to ranks that have one batch less.
    accelerator, model = state.accelerator, state.core_model
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for input_ids in data.batches(
            batch_size, accelerator.process_index, accelerator.num_processes
        ):
            input_ids = input_ids.to(accelerator.device, non_blocking=True)
            loss = forward_loss(model, input_ids, document_end)
            total += loss.double().cpu() * len(input_ids)
    model.train()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum")
    return float(total.item()) / data.num_samples
