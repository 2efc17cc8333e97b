"""A small GPT-NeoX-like model in plain torch, for timing: it needs no transformers.

Parallel residual, LayerNorm, fused causal attention, GELU, untied output; rotary positions are left
out, they change no figure by much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class SampleShape:
    """Sizes of a model and of its batch."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    sequence_length: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch_size * self.sequence_length


class SampleLayer(nn.Module):
    """Attention and feed-forward side by side."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Return the states behind this layer.

        Args:
            states: [batch, tokens, hidden].
        """
        batch, tokens, hidden = states.shape
        projected = self.query_key_value(self.attention_norm(states))
        heads = projected.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, tokens, hidden)
        mixed: Tensor = self.down(functional.gelu(self.up(self.mlp_norm(states))))
        result: Tensor = states + self.dense(attended) + mixed
        return result


class SampleModel(nn.Module):
    """Token ids in, the mean loss of the next tokens out."""

    def __init__(self, shape: SampleShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        layers = (SampleLayer(shape.hidden_size, shape.num_heads) for _ in range(shape.num_layers))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the loss.

        Args:
            input_ids: [batch, tokens].
        """
        logits = self.head(self.norm(self.layers(self.embedding(input_ids))))
        predicted = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        loss: Tensor = functional.cross_entropy(predicted, input_ids[:, 1:].reshape(-1))
        return loss


def build_sample(shape: SampleShape, device: str) -> tuple[SampleModel, torch.optim.AdamW]:
    """Return a model on a device, and its fused AdamW."""
    model = SampleModel(shape).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
