"""Options of a method or an allocator: the fields of a frozen dataclass, checked on construction.

In a recipe: `[asvd]`, `alpha = 0.5`.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.recipe.values import brief


def option_names(owner: Any) -> list[str]:
    """Names of the options of a dataclass, given the class or an instance."""
    return [field.name for field in fields(owner)]


def check_known(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise UsageError, with near misses, for the first option that `name` does not have."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known) or known
            there = f"near misses: {', '.join(near)}" if near else "it takes none"
            raise UsageError(f"{name}: unknown option {option!r}; {there}")


def check_choice(where: str, value: object, allowed: Collection[str]) -> None:
    """Raise UsageError unless the value is one of the allowed ones; `where` names the option."""
    if not isinstance(value, str) or value not in allowed:
        names = ", ".join(sorted(allowed))
        raise UsageError(f"{where} is {brief(value)}; it must be one of {names}")


def check_number(where: str, value: object, lowest: float, highest: float) -> None:
    """Raise UsageError unless the value is a number within the bounds, inclusive."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and lowest <= value <= highest):  # type: ignore[operator]
        raise UsageError(f"{where} is {value!r}; it must be a number from {lowest} to {highest}")


def check_whole(where: str, value: object, lowest: int, highest: int) -> None:
    """Raise UsageError unless the value is an integer within the bounds, inclusive."""
    if type(value) is not int or not lowest <= value <= highest:
        raise UsageError(
            f"{where} is {value!r}; it must be a whole number from {lowest} to {highest}"
        )
