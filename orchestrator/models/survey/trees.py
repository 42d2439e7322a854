"""Traversal of tensors nested in arguments and return values of modules."""

from typing import Any

from torch import Tensor


def map_tensors(function: Any, tree: Any) -> Any:
    """Copy `tree` (tuples, lists, dicts, any leaf) with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(map_tensors(function, item) for item in tree)
    if isinstance(tree, list):
        return [map_tensors(function, item) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return tree
