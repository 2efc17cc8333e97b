"""Memory and size by formula, before anything is spent.

Parameters, gradients and AdamW's two moments are float32, 4 bytes each: 16 bytes a parameter
(Rajbhandari et al. 2020, ZeRO, section 3.1, with float32 weights in place of mixed-precision
copies). Activations of a layer with fused attention are 34 x tokens x hidden bytes in 16-bit
precision (Korthikanti et al. 2022, section 4.1, without its attention-score term), twice that in
32-bit; with gradient checkpointing only each layer's input is kept. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRAINING_BYTES_PER_PARAMETER = 16
CHECKPOINT_BYTES_PER_PARAMETER = 12
ACTIVATION_BYTES_PER_TOKEN_AND_HIDDEN = 34
CHECKPOINT_OVERHEAD_BYTES = 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs on one device.

    Attributes:
        state: Parameters, gradients and optimizer.
        activations: Kept for the backward pass, with the loss.
    """

    state: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations


def estimate_training_memory(
    *,
    num_parameters: int,
    model_config: Any,
    micro_batch: int,
    sequence_length: int,
    precision: str,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Return the device memory of one rank that holds the whole model."""
    tokens = micro_batch * sequence_length
    width = 1 if precision in ("bf16", "fp16") else 2
    hidden, layers = model_config.hidden_size, model_config.num_hidden_layers
    per_layer = ACTIVATION_BYTES_PER_TOKEN_AND_HIDDEN * width * tokens * hidden
    kept = 2 * width * tokens * hidden * layers + per_layer
    activations = kept if gradient_checkpointing else per_layer * layers
    # The logits, their float32 copy, and their gradient.
    logits = tokens * model_config.vocab_size * (4 + 4 + 2 * width)
    return MemoryEstimate(num_parameters * TRAINING_BYTES_PER_PARAMETER, activations + logits)


def estimate_checkpoint_bytes(num_parameters: int) -> int:
    """Return the size of a checkpoint: weights and AdamW's two moments in float32."""
    return num_parameters * CHECKPOINT_BYTES_PER_PARAMETER + CHECKPOINT_OVERHEAD_BYTES
