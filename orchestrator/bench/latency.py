"""Times of linears by shape, form and rank, for a budget of time.

Shape suffixes: T tokens, O outputs, I inputs, R rank.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.bench.linears import ROUND_SECONDS
from orchestrator.device.timing import Stopwatch, in_turn
from orchestrator.errors import InputError, UsageError
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.forms import LOW_RANK, PIVOTED, Form
from orchestrator.plan.latency_table import FORMAT_VERSION
from orchestrator.plan.linear import Linear
from orchestrator.version import __version__

FORMS: Mapping[Form, type[LowRankLinear]] = {LOW_RANK: LowRankLinear, PIVOTED: PivotedLinear}
"""Measured forms and their modules."""
MOST_RANKS = 12
"""Ranks of a form that are measured, at most."""
POOL_BYTES = 2**28
"""Bytes from which weights are read in turn: more than caches hold, as in a whole model."""
MOST_COPIES = 128
"""Modules between which a measurement alternates, at most."""


def measure_latency(
    linears: Sequence[Linear], *, tokens: int, dtype: torch.dtype, threads: int
) -> dict[str, Any]:
    """Measure the linears of each shape, dense and at multiples, on a GPU if there is one.

    All variants of a shape are measured in turn. Each alternates between copies of its weight that
    lie apart in 256 MiB, so that weights come from memory and not from a cache, as when a whole
    model is passed. Values are random, which takes the same time. Products are called as
    transformers calls them, one by one.

    Args:
        tokens: Tokens of each product.
        threads: Threads of a CPU.

    Returns:
        The JSON of a `LatencyTable`.

    Raises:
        UsageError: A number is below 1.
        InputError: The memory is too small.
    """
    for name, number in (("tokens", tokens), ("threads", threads)):
        if number < 1:
            raise UsageError(f"{name} is {number}; it must be 1 or above")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measured(linears, tokens, dtype)
    except torch.OutOfMemoryError as error:
        raise InputError(f"memory is too small for {tokens} tokens; give fewer --tokens") from error
    finally:
        torch.set_num_threads(before)


def _measured(linears: Sequence[Linear], tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes: dict[tuple[int, int], list[Linear]] = {}
    for linear in linears:
        shapes.setdefault((linear.out_features, linear.in_features), []).append(linear)
    largest = max(linear.values for linear in linears)
    size = max(POOL_BYTES // dtype.itemsize, 2 * largest)
    pool = torch.empty(size, device=device, dtype=dtype).uniform_(-0.1, 0.1)
    entries = []
    for (outputs, inputs), same in shapes.items():
        entry = _times(same[0], pool, tokens, device)
        entries.append({"shape": [outputs, inputs], "count": len(same), **entry})
    return {
        "format_version": FORMAT_VERSION,
        "producer": f"orchestrator {__version__}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clock": "processor" if Stopwatch(device).is_processor else "wall",
        "tokens": tokens,
        "linears": entries,
    }


def grid_of(linear: Linear, form: Form) -> list[int]:
    """Return the ranks that are measured: automatic multiples, evenly from first to last."""
    ranks = AllowedRanks(form, "auto").of(linear)
    places = np.linspace(0, len(ranks) - 1, min(len(ranks), MOST_RANKS))
    return [int(ranks[round(place)]) for place in places.tolist()]


def _times(linear: Linear, pool: Tensor, tokens: int, device: torch.device) -> dict[str, Any]:
    x_TI = torch.empty(tokens, linear.in_features, device=device, dtype=pool.dtype)
    x_TI.uniform_(-1, 1)
    variants = {(form.name, rank): form for form in FORMS for rank in grid_of(linear, form)}
    runs = {"dense": _alternating(_copies(linear, pool, partial(_dense, linear)), x_TI)}
    for (name, rank), form in variants.items():
        make = partial(_factored, linear, FORMS[form], rank)
        runs[f"{name} {rank}"] = _alternating(_copies(linear, pool, make), x_TI)
    with torch.inference_mode():
        times = in_turn(runs, device, least=ROUND_SECONDS)
    found: dict[str, list[list[float]]] = {form.name: [] for form in FORMS}
    for name, rank in variants:
        found[name].append([rank, times[f"{name} {rank}"].median])
    return {
        "dense_seconds": times["dense"].median,
        "spread": max(each.spread for each in times.values()),
        "forms": found,
    }


def _alternating(modules: Sequence[nn.Module], x_TI: Tensor) -> Callable[[], object]:
    """Return a computation that calls the next module every time."""
    following = itertools.cycle(modules)
    return lambda: next(following)(x_TI)


def _copies(linear: Linear, pool: Tensor, make: Callable[[Tensor], nn.Module]) -> list[nn.Module]:
    """Return modules whose values lie evenly apart in the pool.

    Args:
        make: Returns the module whose values are the first ones of a flat tensor.
    """
    count = min(MOST_COPIES, len(pool) // linear.values)
    starts = np.linspace(0, len(pool) - linear.values, count).astype(int)
    return [make(pool[start:]) for start in starts.tolist()]


def _dense(linear: Linear, values: Tensor) -> nn.Module:
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight, _ = _taken(values, made.weight)
    return made.eval()


def _factored(linear: Linear, kind: type[LowRankLinear], rank: int, values: Tensor) -> nn.Module:
    meta = torch.device("meta")
    made = kind(linear.in_features, linear.out_features, rank, bias=False, device=meta)
    assert isinstance(made.down, nn.Linear)
    made.down.weight, others = _taken(values, made.down.weight)
    made.weight, _ = _taken(others, made.weight)
    if isinstance(made, PivotedLinear):
        made.index = _order(linear.out_features, rank).to(values.device)
    return made.eval()


def _taken(values: Tensor, like: Tensor) -> tuple[nn.Parameter, Tensor]:
    """Return a parameter of the shape of `like` over the first values, and the other values."""
    taken = values[: like.numel()].view(like.shape)
    return nn.Parameter(taken, requires_grad=False), values[like.numel() :]


def _order(outputs: int, rank: int) -> Tensor:
    """Return the places of outputs among ascending pivots, drawn at random, and the others."""
    is_pivot_O = torch.zeros(outputs, dtype=torch.bool)
    drawn = torch.randperm(outputs, generator=torch.Generator().manual_seed(rank))
    is_pivot_O[drawn[:rank]] = True
    order_O = torch.cat([is_pivot_O.nonzero()[:, 0], (~is_pivot_O).nonzero()[:, 0]])
    return order_O.argsort().to(torch.int32)
