"""Allocators divide one budget over all linears: curves + budget -> plan. Pure, numpy only, fast.

An allocator takes the targeted linears, their curves by name, a `Budget` and mean cosines, and
returns a `Plan`. Laws of all allocators, tested by one set of tests:

- the stored values never exceed `Budget.total`;
- every linear has at least rank 1 or is dense, unless its expert is dropped, which needs an option
  or a method that asks for it; every rank is below break-even;
- a budget below the stored values of rank 1 everywhere raises `InfeasibleError`;
- exchanging the data of two blocks exchanges their assignments, unless ranks fall with depth
  (`lorc`).

Laws of allocators whose docstring names no exception, where every rank is allowed:

- a larger budget never gives fewer stored values, a smaller rank or a larger loss;
- every linear is dense at a kept fraction of 1.

A new allocator is one file and one line in `ALLOCATORS`, where the tests find it; an allocator of
another package is an entry point.
"""

from collections.abc import Mapping
from typing import Any

from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.errors import UsageError
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.options import check_known, option_names
from orchestrator.registry import Registry

ALLOCATORS: Registry[type[Allocator]] = Registry(
    "orchestrator.allocators",
    {
        "uniform": "orchestrator.allocate.uniform:Uniform",
        "svd-llm-v2": "orchestrator.allocate.svd_llm_v2:SvdLlmV2Allocator",
        "d-rank": "orchestrator.allocate.d_rank:DRankAllocator",
        "mgaa": "orchestrator.allocate.mgaa:MgaaAllocator",
        "lorc": "orchestrator.allocate.lorc:Lorc",
        "learned": "orchestrator.allocate.gates.learned:Learned",
        "path": "orchestrator.allocate.gates.threshold_path:ThresholdPath",
        "soco": "orchestrator.allocate.gates.soco:Soco",
        "strs": "orchestrator.allocate.strs:Strs",
        "search": "orchestrator.allocate.search:SearchAllocator",
        "threshold": "orchestrator.allocate.threshold:Threshold",
        "grasp": "orchestrator.allocate.grasp:GraspAllocator",
        "cap": "orchestrator.allocate.sparsity.cap:CapAllocator",
        "merge-experts": "orchestrator.allocate.experts.merge_experts:MergeExpertsAllocator",
        "reap": "orchestrator.allocate.experts.reap:ReapAllocator",
        "two-sided-sparse": "orchestrator.allocate.sparsity.two_sided:TwoSidedSparseAllocator",
    },
    base=Allocator,
)
"""Every allocator; `Allocator.divides` says for which forms it is."""


def make_allocator(name: str, options: Mapping[str, Any], form: str = "low_rank") -> Allocator:
    """Make the allocator of this name, with these options, for linears of this form.

    Raises:
        UsageError: The allocator does not divide the values of the form, or asks for losses that no
            stage takes; an option does not exist (the message names similar ones), or its value is
            not allowed.
    """
    allocator, divided = ALLOCATORS[name], FORMS[form].divided
    if divided not in allocator.divides:
        fitting = [other for other, each in ALLOCATORS.items() if divided in each.divides]
        raise UsageError(
            f"allocation: {name!r} divides {' or '.join(allocator.divides)}, but the method keeps "
            f"{divided}; it must be one of {', '.join(fitting)}"
        )
    check_known(name, options, option_names(allocator))
    made = allocator(**options)
    if allocator.scoring is not Scoring.NONE:
        from orchestrator.allocate.scored import INTERFACES

        interface = INTERFACES[allocator.scoring]
        if not isinstance(made, interface):
            raise UsageError(
                f"allocation: {name!r} asks for {allocator.scoring.value} without the methods of "
                f"orchestrator.allocate.scored.{interface.__name__}; add them, or ask for none"
            )
    return made
