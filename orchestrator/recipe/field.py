"""One statement per field: default, help text, allowed values and flag of a dataclass field.

Checks on construction, the flags of the command line, their help texts and `SCHEDULE` are read from
these statements.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from orchestrator.errors import UsageError
from orchestrator.recipe.options import check_choice
from orchestrator.recipe.values import check_fraction, of_type, percentage

Value = TypeVar("Value")
_ABOUT = "about"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Description of a field."""

    help: str
    """Documentation of the field, and help text of its flag."""
    choices: tuple[str, ...] = ()
    """Allowed values; any value of the type if empty."""
    at_least: int | None = None
    """Lower limit of a number."""
    is_fraction: bool = False
    """True for a number above 0 and at most 1, also written as 80%."""
    not_empty: bool = False
    check: Callable[[Any], object] | None = None
    """Parser that raises UsageError for a value that is not allowed."""
    metavar: str | None = None
    """Name of the value in the help; by default that of the type."""
    schedule: bool = False
    """True if the field is about where and how fast a run executes."""
    added: bool = False
    """True for a field that recipes of earlier versions lack; see `recipe.ADDED`."""
    decides_bits: bool = False
    """True for a field of the schedule that another size of the same run must keep."""

    def reject_wrong(self, name: str, value: Any) -> None:
        """Raise UsageError unless the value, which has the field's type, is allowed."""
        if self.not_empty and not value:
            raise UsageError(f"{name} is empty; it must name something")
        if value is None:
            return
        if self.choices:
            check_choice(name, value, self.choices)
        if self.at_least is not None and value < self.at_least:
            raise UsageError(f"{name} is {value}; it must be {self.at_least} or above")
        if self.is_fraction:
            check_fraction(name, value)
        if self.check is not None:
            self.check(value)


def required(help: str, **about: Any) -> dict[str, About]:
    """Metadata of a field without a default: `dataclasses.field(metadata=required("..."))`."""
    return {_ABOUT: About(help=help, **about)}


def option(default: Value, help: str, **about: Any) -> Value:
    """Define a field with a default.

    Args:
        help: Documentation of the field; one or two sentences.
        about: Fields of `About`.
    """
    made: Value = field(default=default, metadata=required(help, **about))
    return made


def about(field: Field[Any]) -> About:
    """Return the description of a field."""
    found: About = field.metadata[_ABOUT]
    return found


def described(owner: Any) -> dict[str, Field[Any]]:
    """Return the described fields of a dataclass or an instance of one, by name and in order."""
    return {each.name: each for each in fields(owner) if _ABOUT in each.metadata}


def check_fields(value: Any) -> None:
    """Convert the described fields of a frozen dataclass to their types, and check their values.

    Raises:
        UsageError: A field has a type or value that is not allowed.
    """
    found = described(value)
    for name, each in found.items():
        given = getattr(value, name)
        if about(each).is_fraction and isinstance(given, str) and given.strip().endswith("%"):
            with suppress(ValueError):
                given = percentage(given)
        object.__setattr__(value, name, of_type(name, each.type, given))
    for name, each in found.items():
        about(each).reject_wrong(name, getattr(value, name))
