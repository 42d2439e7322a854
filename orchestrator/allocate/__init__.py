"""Dividing one budget over all linears: curves + budget -> plan. Pure, numpy only, milliseconds.

Every allocator takes the targeted linears, their curves by name and the kept fraction, and returns
a `Plan`. Laws, held for all of them by one battery of tests:

- the stored values never exceed `floor(keep * dense values)`;
- every linear has rank 1 at least, or is dense; no rank reaches break-even;
- more budget never means fewer stored values;
- a budget below what rank 1 everywhere stores is an `InfeasibleError`.
"""

from collections.abc import Callable, Mapping, Sequence

from orchestrator.allocate.uniform import uniform
from orchestrator.plan import Curve, Linear, Plan

Allocator = Callable[[Sequence[Linear], Mapping[str, Curve], float], Plan]

ALLOCATORS: dict[str, Allocator] = {"uniform": uniform}
