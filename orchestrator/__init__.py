"""Compresses large language models on a Ray cluster, by low rank and by low rank + sparse.

The public names; each is imported when it is first asked for, so that importing the package
imports neither torch nor Ray nor transformers.
"""

from typing import TYPE_CHECKING, Any

from orchestrator.version import __version__ as __version__

__all__ = [
    "OrchestratorError",
    "Plan",
    "Recipe",
    "Result",
    "clean",
    "compress",
    "compress_sizes",
    "evaluate",
    "export",
    "load",
    "retarget",
    "retarget_sizes",
    "search",
    "status",
    "verify",
]

if TYPE_CHECKING:
    from orchestrator.api import (
        clean,
        compress,
        compress_sizes,
        evaluate,
        export,
        load,
        retarget,
        retarget_sizes,
        search,
        status,
        verify,
    )
    from orchestrator.errors import OrchestratorError
    from orchestrator.plan.plan import Plan
    from orchestrator.plan.result import Result
    from orchestrator.recipe.recipe import Recipe

_HOMES = {
    "OrchestratorError": "errors",
    "Plan": "plan.plan",
    "Recipe": "recipe.recipe",
    "Result": "plan.result",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"orchestrator.{_HOMES.get(name, 'api')}"), name)
