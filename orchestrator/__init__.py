"""Compresses large language models on a Ray cluster, by low rank and by low rank + sparse.

The public names; each is imported when it is first asked for, so that importing the package
imports neither torch nor Ray nor transformers.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
        search,
        status,
        verify,
    )
    from orchestrator.errors import OrchestratorError
    from orchestrator.plan import Plan
    from orchestrator.recipe import Recipe
    from orchestrator.result import Result

_HOMES = {"OrchestratorError": "errors", "Plan": "plan", "Recipe": "recipe", "Result": "result"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"orchestrator.{_HOMES.get(name, 'api')}"), name)
