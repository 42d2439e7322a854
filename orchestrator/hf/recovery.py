"""Targets of adapters that recover quality: one factor of the compressed linears at a time."""

from typing import Literal

from torch import nn

from orchestrator.errors import InputError, UsageError
from orchestrator.models.forms.base import FormLinear


def recovery_targets(model: nn.Module, factor: Literal["weight", "down"]) -> dict[str, list[str]]:
    """The arguments of `peft.LoraConfig` that adapt one factor of every linear that has two.

    With weight [O, R] = W'_u and down [R, I] = W'_v, SVD-LLM (arXiv 2403.07378) trains
    W'_u + B_u A_u on text with W'_v frozen, merges, then trains W'_v + B_v A_v with the new W'_u
    frozen:

        for factor in ("weight", "down"):
            adapted = get_peft_model(model, LoraConfig(**recovery_targets(model, factor), r=8))
            ...  # train it
            model = adapted.merge_and_unload()

    A merged model has the shapes it had, so it is saved in the same form and size. Load it in
    float32 and cast it when it is merged: bfloat16 rounds most of a small change away. Both
    factors at once cannot be merged, since PEFT does not look inside a linear that it has wrapped
    for `weight`; such a model refuses to be saved. `target_modules="all-linear"` is the second of
    the two steps, with the linears that stayed dense.

    Of pivoted factors `down` are the pivots [R, I] and `weight` the others [O - R, R]; of low rank
    + sparse the entries stay as they are. A basis that several linears share is left out, for it
    would get one adapter from each; training without adapters reaches it.

    Args:
        model: As loaded, or merged; without adapters.

    Raises:
        UsageError: There is no such factor.
        InputError: No linear of the model has one of its own.
    """
    if factor not in ("weight", "down"):
        raise UsageError(f"factor is {factor!r}; it must be weight or down")
    targets = [
        f"{name}.{factor}"
        for name, module in model.named_modules()
        if isinstance(module, FormLinear) and factor in module.adaptable
    ]
    if not targets:
        raise InputError(
            f"{type(model).__name__}: no linear has a factor {factor} of its own to adapt; "
            "give the model as orchestrator compressed it, with a low-rank form"
        )
    # `down` is a linear of its own, `weight` a parameter of the module
    modules, parameters = ([], targets) if factor == "weight" else (targets, [])
    return {"target_modules": modules, "target_parameters": parameters}
