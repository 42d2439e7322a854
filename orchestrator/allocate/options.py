"""Checks of an allocator's options, made when it is constructed."""

from collections.abc import Sequence

from orchestrator.errors import UsageError


def check_choice(where: str, value: object, allowed: Sequence[str]) -> None:
    """Raises UsageError unless the value is one of those named; `where` names the option."""
    if value not in allowed:
        raise UsageError(f"{where} is {value!r}; it must be one of {', '.join(allowed)}")


def check_number(where: str, value: object, lowest: float, highest: float) -> None:
    """Raises UsageError unless the value is a number within the bounds, both included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and lowest <= value <= highest):  # type: ignore[operator]
        raise UsageError(f"{where} is {value!r}; it must be a number from {lowest} to {highest}")
