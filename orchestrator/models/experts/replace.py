"""Replacement of the fused experts modules of a model, and the check that both compute the same.

Fused modules are found by their tensors, not by the name of a family. Each class is tried on small
numbers first: what does not compute the same as `Experts` is refused.
"""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import InputError
from orchestrator.models.experts.layout import ExpertsLayout, is_fused, read_layout
from orchestrator.models.experts.module import Experts

MOST_EXPERT_LINEARS = 2**18
"""Limit of the linears that are made; DeepSeek-V3 has 44,544."""
PROBE_TOLERANCE = 1e-5
PROBE_EXPERTS, PROBE_HIDDEN, PROBE_INNER, PROBE_TOKENS, PROBE_CHOICES = 3, 4, 6, 5, 2
EXPERTS_NAMES = ("num_experts",)
HIDDEN_NAMES = ("hidden_size", "hidden_dim")
INNER_NAMES = ("intermediate_size", "intermediate_dim", "expert_dim")
"""Attributes of a fused module with its sizes; its code may read them."""


def replace_experts(model: nn.Module) -> dict[str, ExpertsLayout]:
    """Replace in place every fused experts module by `Experts`; a model without any is unchanged.

    Call it on the model as its class builds it. Device and dtype are those of the fused tensors;
    on the meta device no memory is allocated, elsewhere the values are copied.

    Returns:
        The layout of each replaced module, by its name, in model order.

    Raises:
        InputError: A fused module has other tensors or arguments, or computes something else; or
            the model has more than `MOST_EXPERT_LINEARS` linears of experts.
    """
    layouts = find_experts(model)
    check_count(type(model).__name__, layouts.values())
    checked = set()
    for name, layout in layouts.items():
        native = model.get_submodule(name)
        if type(native) not in checked:
            check_experts(name, native, layout)
            checked.add(type(native))
        experts = Experts(native, layout).train(native.training)
        if not native.get_parameter("down_proj").is_meta:
            experts.copy_values(native)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, experts)
    return layouts


def check_count(name: str, layouts: Iterable[ExpertsLayout]) -> None:
    """Raise InputError if a model has more than `MOST_EXPERT_LINEARS` linears of experts."""
    count = sum(layout.num_experts * len(layout.parts) for layout in layouts)
    if count > MOST_EXPERT_LINEARS:
        raise InputError(
            f"{name}: {count:,} linears of experts; at most {MOST_EXPERT_LINEARS:,} are supported"
        )


def find_experts(model: nn.Module) -> dict[str, ExpertsLayout]:
    """Find the fused experts modules of a model as its class builds it, by name, in model order.

    Raises:
        InputError: As `read_layout`.
    """
    fused = ((name, module) for name, module in model.named_modules() if is_fused(module))
    return {name: read_layout(name, module) for name, module in fused}


def check_experts(name: str, native: nn.Module, layout: ExpertsLayout) -> None:
    """Compare `Experts` with a fused module's own code on small random numbers; no value is read.

    3 experts of 4 x 6 and 5 tokens, on the CPU in float32.

    Args:
        name: Name of the module, for errors.

    Raises:
        InputError: The outputs differ by more than `PROBE_TOLERANCE`, relative to the largest, or
            the fused module's code fails.
    """
    where = f"{name}: experts of class {type(native).__name__}"
    generator = torch.Generator().manual_seed(0)
    try:
        # models are built where another device is the default
        with torch.no_grad(), torch.device("cpu"):
            small = _small_copy(native, layout, generator)
            arguments = _probe_arguments(layout, generator)
            expected = inspect.unwrap(type(native).forward)(small, *arguments)
            experts = Experts(small, read_layout(name, small))
            experts.copy_values(small)
            found = experts(*arguments)
        largest = max(1.0, float(expected.abs().max()))
        difference = float((found - expected).abs().max()) / largest
    except Exception as error:  # foreign code may raise anything on other sizes
        kind = type(error).__name__
        raise InputError(
            f"{where} cannot be tried on small numbers ({kind}: {str(error).splitlines()[:1]}); "
            "such experts are not supported"
        ) from error
    if not difference <= PROBE_TOLERANCE:  # also if it is not a number
        raise InputError(
            f"{where} do not compute down(activation(gate, up)) of each expert: on small numbers "
            f"the outputs differ by {difference:.1e}, at most {PROBE_TOLERANCE:.0e} is allowed; "
            "such experts are not supported"
        )


def _small_copy(native: nn.Module, layout: ExpertsLayout, generator: torch.Generator) -> nn.Module:
    """Copy a fused module with the sizes of the probe and random values."""
    small = copy.copy(native)
    small.__dict__ = dict(native.__dict__)
    sizes = {
        **dict.fromkeys(EXPERTS_NAMES, PROBE_EXPERTS),
        **dict.fromkeys(HIDDEN_NAMES, PROBE_HIDDEN),
    }
    sizes |= dict.fromkeys(INNER_NAMES, PROBE_INNER)
    small.__dict__.update({key: sizes[key] for key in sizes if key in small.__dict__})
    shapes = replace(
        layout, num_experts=PROBE_EXPERTS, hidden=PROBE_HIDDEN, inner=PROBE_INNER
    ).fused_shapes()
    small._parameters = {
        key: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32))
        for key, shape in shapes.items()
    }
    return small


def _probe_arguments(layout: ExpertsLayout, generator: torch.Generator) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    states_TH = torch.randn(PROBE_TOKENS, PROBE_HIDDEN, **options)
    ranked_TE = torch.rand(PROBE_TOKENS, PROBE_EXPERTS, **options).argsort(dim=1)
    weights_TK = torch.rand(PROBE_TOKENS, PROBE_CHOICES, **options)
    index_TK = ranked_TE[:, :PROBE_CHOICES]
    if not layout.takes_scored_inputs:
        return states_TH, index_TK, weights_TK
    scores_TE = torch.zeros_like(ranked_TE, dtype=torch.float32).scatter(1, index_TK, weights_TK)
    return ((states_TH * scores_TE.T[..., None]).reshape(-1, PROBE_HIDDEN),)
