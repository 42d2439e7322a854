"""Published methods, each a named composition of statistics, norm, decomposition and allocation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.methods.asvd import Asvd
from orchestrator.methods.base import Method
from orchestrator.methods.basis_sharing import BasisSharing
from orchestrator.methods.cap import Cap
from orchestrator.methods.d_rank import DRank
from orchestrator.methods.mgaa import Mgaa
from orchestrator.methods.svd import Svd
from orchestrator.methods.svd_llm import SvdLlm
from orchestrator.methods.svd_llm_v2 import SvdLlmV2
from orchestrator.methods.two_sided import TwoSided
from orchestrator.methods.two_sided_sparse import TwoSidedSparse
from orchestrator.methods.wanda import Wanda
from orchestrator.recipe.options import check_known, option_names

_ALL: tuple[Method, ...] = (
    Svd(),
    Asvd(),
    SvdLlm(),
    SvdLlmV2(),
    BasisSharing(),
    DRank(),
    Mgaa(),
    Cap(),
    TwoSided(),
    TwoSidedSparse(),
    Wanda(),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Every method with its options at their defaults."""


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name with these options.

    Raises:
        UsageError: An option does not exist (with near misses), or has a value not allowed.
    """
    method = METHODS[name]
    check_known(name, options, option_names(method))
    return replace(method, **options)
