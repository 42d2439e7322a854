"""Published methods, each a named composition of statistics, norm, decomposition and allocation.

A new method is one file and one line in `METHODS`; a method of another package is an entry point.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.methods.base import Method
from orchestrator.recipe.options import check_known, option_names
from orchestrator.registry import Registry

METHODS: Registry[Method] = Registry(
    "orchestrator.methods",
    {
        "svd": "orchestrator.methods.svd:Svd",
        "asvd": "orchestrator.methods.asvd:Asvd",
        "svd-llm": "orchestrator.methods.svd_llm:SvdLlm",
        "svd-llm-v2": "orchestrator.methods.svd_llm_v2:SvdLlmV2",
        "basis-sharing": "orchestrator.methods.basis_sharing:BasisSharing",
        "d-rank": "orchestrator.methods.d_rank:DRank",
        "mgaa": "orchestrator.methods.mgaa:Mgaa",
        "lpaf": "orchestrator.methods.lpaf:Lpaf",
        "bolaco": "orchestrator.methods.bolaco:Bolaco",
        "cap": "orchestrator.methods.cap:Cap",
        "two-sided": "orchestrator.methods.two_sided:TwoSided",
        "grasp": "orchestrator.methods.grasp:Grasp",
        "two-sided-sparse": "orchestrator.methods.two_sided_sparse:TwoSidedSparse",
        "expert-sharing": "orchestrator.methods.expert_sharing:ExpertSharing",
        "wanda": "orchestrator.methods.wanda:Wanda",
        "reap": "orchestrator.methods.reap:Reap",
        "merge-experts": "orchestrator.methods.merge_experts:MergeExperts",
    },
    base=Method,
    makes=True,
)
"""Every method with its options at their defaults."""


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name with these options.

    Raises:
        UsageError: An option does not exist (with near misses), or has a value not allowed.
    """
    method = METHODS[name]
    check_known(name, options, option_names(method))
    return replace(method, **options)
