"""Model without weights, which shards fill with those of their blocks."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class EmptyModel:
    """Model without weights, shared by all shards of a lazy model."""

    model: PreTrainedModel
    prefix: str
    blocks: nn.ModuleList
    extras: tuple[str, ...]
    """Names of block arguments whose contents are part of the block state."""
    device: torch.device
