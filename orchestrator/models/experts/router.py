"""Router beside experts: its tensors with a row for each expert, and the removal of rows.

A router is found by structure: a module beside experts, of the same parent, with a matrix that has
a row for each of them. Vectors of that length in it, a bias or a correction, lose rows too.

Shape suffixes: T tokens, H hidden.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.experts.module import Experts

COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")
"""Attributes of a router with the number of experts; its code may read them."""
ROUTER_TOLERANCE = 1e-5
ROUTED_TOKENS = 5
LOWEST = -1e4
"""Logit of the expert that no token may choose, in the comparison of both routers."""


def find_router(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Find the router of an experts module, by its name; None if there is none of its own."""
    around, _, own = name.rpartition(".")
    experts = model.get_submodule(name)
    assert isinstance(experts, Experts)
    for child, module in model.get_submodule(around).named_children():
        matrices = [each for each in module._parameters.values() if each is not None]
        if child != own and any(e.ndim == 2 and len(e) == experts.num_experts for e in matrices):
            return f"{around}.{child}", module
    return None


def row_tensors(router: nn.Module, count: int) -> list[str]:
    """Return the names of a router's own tensors with a row for each of `count` experts."""
    own = {**router._parameters, **router._buffers}
    return [key for key, each in own.items() if each is not None and len(each) == count]


def keep_rows(router: nn.Module, count: int, numbers: Sequence[int]) -> None:
    """Keep the rows of some of `count` experts, in this order; in place, on any device."""
    for key in row_tensors(router, count):
        if key in router._buffers:
            router._buffers[key] = router.get_buffer(key)[list(numbers)]
        else:
            whole = router.get_parameter(key)
            kept = whole.detach()[list(numbers)]
            router._parameters[key] = nn.Parameter(kept, requires_grad=whole.requires_grad)
    for attribute in COUNT_NAMES:
        if router.__dict__.get(attribute) == count:
            setattr(router, attribute, len(numbers))


def reduce_router(model: nn.Module, name: str) -> None:
    """Take the dropped experts of a module out of its router, which then chooses among the rest."""
    experts = model.get_submodule(name)
    assert isinstance(experts, Experts)
    count = experts.num_experts
    numbers = tuple(number for number in range(count) if not experts.is_dropped(number))
    found = find_router(model, name)
    if found is not None and len(numbers) < count:
        keep_rows(found[1], count, numbers)
        experts.numbers = numbers


def can_lose_rows(router: nn.Module, count: int) -> bool:
    """Test if a router without the row of an expert decides as the whole one with that row lowest.

    Tried on random numbers, 5 tokens of its own width on the CPU in float32; no value is read. One
    that compares groups of experts does not, nor does code that fails on another number of rows.
    """
    gone = count // 2
    numbers = [number for number in range(count) if number != gone]
    try:
        with torch.no_grad(), torch.device("cpu"):
            whole, hidden = _random_copy(router, count, gone)
            fewer = copy.copy(whole)
            fewer._parameters, fewer._buffers = dict(whole._parameters), dict(whole._buffers)
            keep_rows(fewer, count, numbers)
            expected, found = (_outputs(each(hidden.clone())) for each in (whole, fewer))
        return _agree(expected, found, torch.tensor(numbers))
    except Exception:  # foreign code may raise anything on other sizes
        return False


def _random_copy(router: nn.Module, count: int, gone: int) -> tuple[nn.Module, Tensor]:
    """Copy a router with random values, one expert's logits the lowest; with inputs [T, H]."""
    generator, small = torch.Generator().manual_seed(0), copy.copy(router)
    small.__dict__ = dict(router.__dict__)
    small._parameters, small._buffers = dict(router._parameters), dict(router._buffers)
    width = 0
    for key in row_tensors(router, count):
        is_buffer = key in router._buffers
        meant: Any = router._buffers[key] if is_buffer else router._parameters[key]
        values = 0.1 * torch.randn(meant.shape, generator=generator, dtype=torch.float32)
        if values.ndim > 1:
            width = values.shape[1]
            values[gone] = 0.0
            values[gone, 0] = LOWEST
        else:
            values[gone] = LOWEST
        if is_buffer:
            small._buffers[key] = values
        else:
            small._parameters[key] = nn.Parameter(values)
    hidden_TH = torch.randn(ROUTED_TOKENS, width, generator=generator, dtype=torch.float32)
    hidden_TH[:, 0] = 1.0
    return small.eval(), hidden_TH


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _agree(whole: list[Tensor], fewer: list[Tensor], numbers: Tensor) -> bool:
    """Compare outputs: indices of experts, values of the chosen, and values of all."""
    orders = None
    for one, other in zip(whole, fewer, strict=True):
        if not one.is_floating_point():
            orders = one.argsort(dim=-1), other.argsort(dim=-1)
    for one, other in zip(whole, fewer, strict=True):
        expected, found = one, other
        if one.shape != other.shape:
            expected = one[..., numbers]
        elif orders is not None:
            expected, found = one.gather(-1, orders[0]), other.gather(-1, orders[1])
            found = found if found.is_floating_point() else numbers[found]
        if not torch.allclose(expected.float(), found.float(), atol=ROUTER_TOLERANCE):
            return False
    return True
