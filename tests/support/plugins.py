"""Packages that extend orchestrator, installed in this process for a test."""

import sys
from contextlib import contextmanager
from pathlib import Path

from orchestrator.catalogue import REGISTRIES
from orchestrator.recipe.recipe import Recipe

PLUGIN = Path(__file__).parent / "plugin"


@contextmanager
def on_path(directory):
    """Install the packages of a directory in this process."""
    sys.path.insert(0, str(directory))
    for registry in REGISTRIES.values():
        registry.refresh()
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for registry in REGISTRIES.values():
            registry.refresh()


def recipe_of(**given):
    return Recipe(**{"model": "m", "out": "o", "method": "svd-llm", "keep": 0.5} | given)
