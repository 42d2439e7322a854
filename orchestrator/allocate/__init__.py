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

from collections.abc import Mapping
from typing import Any

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.cap import CapAllocator
from orchestrator.allocate.d_rank import DRankAllocator
from orchestrator.allocate.mgaa import MgaaAllocator
from orchestrator.allocate.strs import Strs
from orchestrator.allocate.svd_llm_v2 import SvdLlmV2Allocator
from orchestrator.allocate.threshold import Threshold
from orchestrator.allocate.two_sided_sparse import TwoSidedSparseAllocator
from orchestrator.allocate.uniform import Uniform, UniformSparse
from orchestrator.errors import UsageError
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.options import check_known, option_names

ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "svd-llm-v2": SvdLlmV2Allocator,
    "d-rank": DRankAllocator,
    "mgaa": MgaaAllocator,
    "strs": Strs,
    "threshold": Threshold,
}


SPARSE_ALLOCATORS: dict[str, type[Allocator]] = {"uniform": UniformSparse}
"""The same, for linears that become sparse: they divide entries instead of ranks."""
POOL_ALLOCATORS: dict[str, type[Allocator]] = {
    "cap": CapAllocator,
    "two-sided-sparse": TwoSidedSparseAllocator,
}
"""The same, for linears that keep ranks and entries side by side; each of what the method of the
same name stores."""
ALLOCATION_NAMES = frozenset({*ALLOCATORS, *SPARSE_ALLOCATORS, *POOL_ALLOCATORS})
_BY_PARTS: dict[tuple[bool, bool], tuple[str, dict[str, type[Allocator]]]] = {
    (True, False): ("ranks", ALLOCATORS),
    (False, True): ("entries", SPARSE_ALLOCATORS),
    (True, True): ("ranks and entries together", POOL_ALLOCATORS),
}
"""By whether a form has a rank, and whether it has entries."""


def make_allocator(name: str, options: Mapping[str, Any], form: str = "low_rank") -> Allocator:
    """The allocator of this name for linears that take this form, with these options.

    Raises:
        UsageError: It does not divide what the form is made of; an option does not exist (with
            near misses), or has a value not allowed.
    """
    taken = FORMS[form]
    parts, table = _BY_PARTS[taken.has_rank, taken.has_nonzeros]
    if name not in table:
        divided = "ranks and entries together" if name in POOL_ALLOCATORS else "ranks"
        raise UsageError(
            f"allocation: {name!r} divides {divided}, and of a linear the method keeps {parts}; it "
            f"must be one of {', '.join(table)}"
        )
    check_known(name, options, option_names(table[name]))
    return table[name](**options)
