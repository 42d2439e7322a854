"""Dividing one budget over all linears: curves + budget -> plan. Pure, numpy only, milliseconds.

Every allocator takes the targeted linears, their curves by name, the kept fraction and the mean
cosines that it may ask for, and returns a `Plan`. Laws, held for all of them by one battery of
tests:

- the stored values never exceed `floor(keep * dense values)`;
- every linear has rank 1 at least, or is dense; no rank reaches break-even;
- a budget below what rank 1 everywhere stores is an `InfeasibleError`;
- blocks that exchange all that is known of them exchange what they get.

Held by those whose docstring does not say otherwise:

- more budget never means fewer stored values, a smaller rank or a larger loss;
- everything is dense at 1.

A new allocator is one file, and one line in `ALLOCATORS`; the battery finds it there.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol

from orchestrator.allocate.d_rank import DRank
from orchestrator.allocate.mgaa import Mgaa
from orchestrator.allocate.svd_llm_v2 import SvdLlmV2
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import UsageError
from orchestrator.plan import Curve, Linear, Plan


class Allocator(Protocol):
    """A frozen dataclass whose fields are its options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    needs_cosines: ClassVar[bool]
    """Whether it reads `cosines`; calibration measures them only where this is so."""

    def __init__(self, **options: Any) -> None:
        """Raises UsageError for an option's value that is not allowed."""

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        keep: float,
        cosines: Mapping[str, float],
    ) -> Plan:
        """`cosines`: by `Linear.sublayer`, the mean over calibration tokens of the cosine between
        the residual stream before and after it; empty where they are not asked for."""
        ...


ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "svd-llm-v2": SvdLlmV2,
    "d-rank": DRank,
    "mgaa": Mgaa,
}


def make_allocator(name: str, options: Mapping[str, Any]) -> Allocator:
    """The allocator of this name with these options.

    Raises:
        UsageError: An option does not exist (with near misses), or has a value not allowed.
    """
    known = [field.name for field in fields(ALLOCATORS[name])]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known) or known
            there = f"near misses: {', '.join(near)}" if near else "it takes none"
            raise UsageError(f"{name}: unknown option {option!r}; {there}")
    return ALLOCATORS[name](**options)
