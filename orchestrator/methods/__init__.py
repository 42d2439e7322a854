"""Published methods, each a named composition of statistics, norm, decomposition and allocation."""

from orchestrator.methods.base import Method
from orchestrator.methods.d_rank import DRank
from orchestrator.methods.mgaa import Mgaa
from orchestrator.methods.svd_llm import SvdLlm
from orchestrator.methods.svd_llm_v2 import SvdLlmV2

METHODS: dict[str, Method] = {
    method.name: method for method in (SvdLlm(), SvdLlmV2(), DRank(), Mgaa())
}
