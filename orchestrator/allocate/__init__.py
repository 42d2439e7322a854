"""Allocators divide one budget over all linears: curves + budget -> plan. Pure, numpy only, fast.

An allocator takes the targeted linears, their curves by name, the kept fraction and mean cosines,
and returns a `Plan`. Laws of all allocators, tested by one set of tests:

- the stored values never exceed `floor(keep * dense values)`;
- every linear has at least rank 1 or is dense; every rank is below break-even;
- a budget below the stored values of rank 1 everywhere raises `InfeasibleError`;
- exchanging the data of two blocks exchanges their assignments.

Laws of allocators whose docstring names no exception:

- a larger budget never gives fewer stored values, a smaller rank or a larger loss;
- every linear is dense at keep 1.

A new allocator is one file and one line in `ALLOCATORS`, where the tests find it.
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
"""Allocators for sparse linears: they divide entries instead of ranks."""
POOL_ALLOCATORS: dict[str, type[Allocator]] = {
    "cap": CapAllocator,
    "two-sided-sparse": TwoSidedSparseAllocator,
}
"""Allocators for linears with both ranks and entries; each for the results of the method of the
same name."""
ALLOCATION_NAMES = frozenset({*ALLOCATORS, *SPARSE_ALLOCATORS, *POOL_ALLOCATORS})
_BY_PARTS: dict[tuple[bool, bool], tuple[str, dict[str, type[Allocator]]]] = {
    (True, False): ("ranks", ALLOCATORS),
    (False, True): ("entries", SPARSE_ALLOCATORS),
    (True, True): ("ranks and entries together", POOL_ALLOCATORS),
}
"""Parts that are divided and their allocators, by `has_rank` and `has_nonzeros` of a form."""


def make_allocator(name: str, options: Mapping[str, Any], form: str = "low_rank") -> Allocator:
    """Make the allocator of this name, with these options, for linears of this form.

    Raises:
        UsageError: The allocator does not divide the values of the form; an option does not exist
            (the message names similar ones), or its value is not allowed.
    """
    taken = FORMS[form]
    parts, table = _BY_PARTS[taken.has_rank, taken.has_nonzeros]
    if name not in table:
        divided = "ranks and entries together" if name in POOL_ALLOCATORS else "ranks"
        raise UsageError(
            f"allocation: {name!r} divides {divided}, but the method keeps {parts}; "
            f"it must be one of {', '.join(table)}"
        )
    check_known(name, options, option_names(table[name]))
    return table[name](**options)
