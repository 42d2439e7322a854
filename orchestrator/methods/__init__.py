"""Published methods, each a named composition of statistics, norm, decomposition and allocation."""

from orchestrator.methods.base import Method
from orchestrator.methods.svd_llm import SvdLlm

METHODS: dict[str, Method] = {"svd-llm": SvdLlm()}
