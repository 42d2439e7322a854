"""Times of a model's linears, one of each role and shape, beside dense ones of the same shape.

Shape suffixes: T tokens, I inputs.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from orchestrator.bench.reasons import MeasuredLinear, reasons
from orchestrator.bench.roofline import Roofline
from orchestrator.device.timing import in_turn
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.forms.low_rank import LowRankLinear

ROUND_SECONDS = 1e-3
"""Least seconds of a round of one linear."""
TINY = 8
"""Inputs and outputs of linears that take the time of their calls alone."""


def role_of(name: str) -> str:
    """Return the name of a linear within its block: the part after the last number."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def typical(model: nn.Module) -> dict[tuple[str, int, int], tuple[FormLinear, int]]:
    """Return the compressed linear of median rank of each role and shape, and their number.

    Dropped ones take no time.
    """
    found: dict[tuple[str, int, int], list[FormLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FormLinear) and module.weight is not None:
            key = role_of(name), module.out_features, module.in_features
            found.setdefault(key, []).append(module)
    return {
        key: (sorted(same, key=lambda each: getattr(each, "rank", 0))[len(same) // 2], len(same))
        for key, same in found.items()
    }


def linear_rows(
    model: nn.Module, tokens: Sequence[int], limits: Roofline, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Measure the typical linears at numbers of tokens, one row for each of both.

    The dense one has random values, which take the same time; one is made for each shape.
    """
    generator = torch.Generator().manual_seed(0)
    calls = dict[str, float]()
    for (role, outputs, inputs), (module, count) in typical(model).items():
        dtype = next(module.parameters()).dtype
        dense = nn.Linear(inputs, outputs, bias=module.bias is not None)
        dense = dense.to(device, dtype).requires_grad_(False)
        if module.form not in calls:
            calls[module.form] = _added_by_calls(type(module), dtype, device)
        for number in tokens:
            x_TI = torch.randn(number, inputs, generator=generator).to(device, dtype)
            with torch.inference_mode():
                runs = {"dense": partial(dense, x_TI), "compressed": partial(module, x_TI)}
                times = in_turn(runs, device, least=ROUND_SECONDS)
            measured = MeasuredLinear(
                out_features=outputs,
                in_features=inputs,
                form=module.form,
                rank=getattr(module, "rank", 0),
                values=sum(p.numel() for n, p in module.named_parameters() if n != "bias"),
                tokens=number,
                dense=times["dense"].median,
                compressed=times["compressed"].median,
                spread=max(each.spread for each in times.values()),
            )
            why = reasons(measured, limits, calls[module.form])
            yield {"role": role, "count": count, **_row(measured, limits), "why": why}


def _added_by_calls(kind: type[FormLinear], dtype: torch.dtype, device: torch.device) -> float:
    """Measure by how many seconds a call of a form takes longer than that of a dense linear.

    Of factors with next to no values; 0 for a form without.
    """
    if not issubclass(kind, LowRankLinear):
        return 0.0
    small = kind(TINY, TINY, TINY // 4, bias=False, device=device, dtype=dtype)
    for tensor in (*small.parameters(), *small.buffers()):
        tensor.detach().zero_()
    dense = nn.Linear(TINY, TINY, bias=False, device=device, dtype=dtype)
    x_TI = torch.zeros(1, TINY, device=device, dtype=dtype)
    with torch.inference_mode():
        runs = {"dense": partial(dense, x_TI), "form": partial(small, x_TI)}
        times = in_turn(runs, device, least=ROUND_SECONDS)
    return max(times["form"].median - times["dense"].median, 0.0)


def _row(measured: MeasuredLinear, limits: Roofline) -> dict[str, Any]:
    least_dense, least = measured.bounds(limits)
    return {
        "shape": [measured.out_features, measured.in_features],
        "form": measured.form,
        "rank": measured.rank,
        "kept": measured.kept,
        "tokens": measured.tokens,
        "dense_seconds": measured.dense,
        "seconds": measured.compressed,
        "spread": measured.spread,
        "speed": measured.speed,
        "dense_least_seconds": least_dense,
        "least_seconds": least,
    }
