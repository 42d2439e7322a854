"""A smaller cache for a model whose keys and values are low-rank: latents in the place of outputs.

    model.generate(**inputs, past_key_values=latent_cache(model))

The stock attention of transformers computes with it. It saves memory, not time: every call rebuilds
the keys or values of all tokens of one layer, which are as large as that layer's dense cache.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from orchestrator.errors import InputError, UsageError
from orchestrator.hf.latent_attention import family_of, rotary_of, tells
from orchestrator.hf.latent_layer import (
    CachedPart,
    FullPart,
    LatentLayer,
    LatentPart,
    ProjectedPart,
)
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.plan.cache_size import LATENT_VALUES


class LatentCache(DynamicCache):  # type: ignore[misc] # transformers has no types
    """Cache of a model that stores latents where they are smaller; made by `latent_cache`.

    Layers with a sliding window, which are small, and those without a low-rank linear are those of
    `DynamicCache`. `reset` empties it for further texts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        found = {each.layer_idx: each for each in model.modules() if _stores_values(each)}
        if found.keys() != {*range(len(self.layers))}:
            lacking = len(self.layers) - len(found)
            raise UsageError(
                f"latent_cache: {type(model).__name__} has no attention of "
                f"{', '.join(LATENT_VALUES)} in {lacking} of {len(self.layers)} blocks; generate "
                "with the cache of transformers, or a QuantizedCache for a smaller one"
            )
        rotary = rotary_of(model)
        self.bytes_a_token = self.dense_bytes_a_token = 0
        for index, attention in found.items():
            itemsize, dense = model.dtype.itemsize, _width(attention.k_proj)
            dense = itemsize * (dense + _width(attention.v_proj))
            self.dense_bytes_a_token += dense
            # sliding layers are left alone
            layer = _layer(attention, rotary) if type(self.layers[index]) is DynamicLayer else None
            if layer is not None and layer.bytes_a_token(itemsize) < dense:
                self.layers[index], dense = layer, layer.bytes_a_token(itemsize)
            self.bytes_a_token += dense

    bytes_a_token: int
    """Bytes that a token of one sequence takes; in a sliding layer, as long as it is within."""
    dense_bytes_a_token: int
    """Bytes that it takes in a `DynamicCache`."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that are stored."""
        named = ("keys", "values", "positions_BT")
        tensors = [getattr(layer, name, None) for layer in self.layers for name in named]
        return sum(each.nbytes for each in tensors if each is not None)


def latent_cache(model: PreTrainedModel) -> LatentCache:
    """Make an empty cache that stores the latents of values, and of keys if the model tells them.

    Values v = U c + bias of a low-rank or pivoted v_proj are stored as R numbers a token, by the
    projection that `ProjectedPart` states. After `latent_attention(model)` keys are stored as R
    numbers and a position, int32, and values as the latents of their linear, without a projection:
    see `LatentPart`. Tokens are the same as without, logits but for rounding.

    Bytes a token: in every block the itemsize times the ranks of k_proj and v_proj, or their
    outputs where one is not low-rank or not told, and 4 for the position.

    Without `latent_attention` each call computes a QR decomposition for each block, O(O R^2) in
    float64: `cache.reset()` empties a cache for the next text. The model must be on its device.

    Raises:
        UsageError: The family is not one of `LATENT_VALUES`, or no token would be smaller.
        InputError: A factor is offloaded.
    """
    cache = LatentCache(model)
    if cache.bytes_a_token >= cache.dense_bytes_a_token:
        raise UsageError(
            f"latent_cache: a token of {type(model).__name__} takes {cache.bytes_a_token} bytes "
            f"with latents and positions, and {cache.dense_bytes_a_token} without: it needs "
            "low-rank v_proj, or k_proj after latent_attention(model), in blocks without a sliding "
            "window; generate with the cache of transformers"
        )
    return cache


def _stores_values(module: nn.Module) -> bool:
    return family_of(module) in LATENT_VALUES


def _width(module: Any) -> int:
    """Return the outputs of a linear in any form."""
    return int(module.out_features)


def _layer(attention: Any, rotary: nn.Module | None) -> LatentLayer | None:
    """Return the layer of one attention; None if it would store no latent."""
    head, is_told = attention.head_dim, tells(attention)
    k_proj, v_proj = attention.k_proj, attention.v_proj
    keys, values = FullPart(_width(k_proj)), FullPart(_width(v_proj))
    parts: list[CachedPart] = [keys, values]
    if is_told and _is_low_rank(k_proj):
        norm = getattr(attention, "k_norm", None)
        parts[0] = LatentPart(k_proj, head, norm=norm, rotary=rotary)
    if _is_low_rank(v_proj):
        parts[1] = LatentPart(v_proj, head) if is_told else ProjectedPart(v_proj, head)
    return None if parts == [keys, values] else LatentLayer(*parts)


def _is_low_rank(module: nn.Module) -> bool:
    """Return True for a linear with latents.

    Raises:
        InputError: Its factor is not in memory.
    """
    if not isinstance(module, LowRankLinear):
        return False
    if module.weight.is_meta:
        raise InputError(
            "latent_cache: the factors of an attention are offloaded, and a cache needs them at "
            "every call; load the model with a device_map that has its attention in memory"
        )
    return True
