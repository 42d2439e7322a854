"""Keys as latents: attention modules that tell a cache their inputs, from which keys are rebuilt.

LoRC (2410.03111) caches the latents of keys. Attention hands rotated keys to its cache, which have
full rank whatever the rank of their linear, so that a cache alone cannot find the latents. Here a
hook before the attention hands its inputs x and their positions over; the layer of the cache stores
c = D x, and rebuilds and rotates U c for all tokens at every call.

Departures from the paper: attention itself, with its queries and kernels, is the one of
transformers, where the paper folds U into the query of models without rotation.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from orchestrator.errors import UsageError
from orchestrator.hf.latent_layer import LatentLayer
from orchestrator.plan.cache_size import LATENT_KEYS

CHANGING = ("dynamic", "longrope")
"""Rotations whose frequencies change with the length, so that a key rotated anew is another one."""


def family_of(attention: nn.Module) -> str:
    """Return the family of an attention module of transformers, `Llama`; empty for others."""
    kind = type(attention)
    is_known = kind.__module__.startswith("transformers.models.")
    is_attention = is_known and kind.__name__.endswith("Attention")
    return kind.__name__.removesuffix("Attention") if is_attention else ""


def latent_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's keys cacheable as latents by `latent_cache`; returns the model.

    A hook is registered on each attention module; all else stays as it is, and without a latent
    cache the model computes what it did. Another call has no effect.

    Raises:
        UsageError: The family is not one of `LATENT_KEYS`, or the rotation of its keys changes with
            the length.
    """
    found = [each for each in model.modules() if family_of(each) in LATENT_KEYS]
    if not found:
        raise UsageError(
            f"latent_attention: {type(model).__name__} has no attention of "
            f"{', '.join(LATENT_KEYS)}; latent_cache(model) alone stores values as latents for more"
        )
    kind = rotation_of(model)
    if kind in CHANGING:
        raise UsageError(
            f"latent_attention: the rotation of {type(model).__name__} is {kind!r}, which changes "
            "with the length, so that keys cannot be rotated later; use latent_cache(model) alone"
        )
    for attention in found:
        if not tells(attention):
            attention.register_forward_pre_hook(_tell, with_kwargs=True)
    return model


def tells(attention: nn.Module) -> bool:
    """Return True for an attention that `latent_attention` has registered its hook on."""
    return _tell in attention._forward_pre_hooks.values()


def rotary_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the module of the decoder that makes the rotation of keys; None: there is none."""
    rotary: nn.Module | None = getattr(model.get_decoder(), "rotary_emb", None)
    return rotary


def rotation_of(model: PreTrainedModel) -> str:
    """Return the kind of the rotation, `default`; empty if there is none."""
    return str(getattr(rotary_of(model), "rope_type", ""))


def _tell(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hand the inputs of an attention to its layer of the cache, if that stores latents."""
    cache = kwargs.get("past_key_values")
    index: Any = attention.layer_idx
    if not isinstance(cache, Cache) or index >= len(cache.layers):
        return
    layer = cache.layers[index]
    if isinstance(layer, LatentLayer):
        inputs_BTI: Tensor = args[0] if args else kwargs["hidden_states"]
        layer.tell(inputs_BTI, kwargs.get("position_ids"))
