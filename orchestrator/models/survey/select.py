"""Selectors: which linears a user means.

A selector always covers the whole module name. `re:` starts a regular expression that must match
all of it (`re:.*[qk]_proj`); anything else is an exact name or, with `*`, `?` or `[...]`, a glob
whose `*` crosses dots (`*.mlp.*`).
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from orchestrator.errors import UsageError

NEAR_MISSES = 3


def select(names: Sequence[str], target: Iterable[str], ignore: Iterable[str] = ()) -> list[str]:
    """The names that a target selector covers and no ignore selector does, in their own order.

    Raises:
        UsageError: A selector covers no name (near misses are listed), a regular expression is
            invalid, or nothing is left.
    """
    targeted = {name for selector in target for name in covered(names, selector)}
    ignored = {name for selector in ignore for name in covered(names, selector)}
    chosen = [name for name in names if name in targeted and name not in ignored]
    if not chosen:
        raise UsageError(
            f"no linear is left: {len(targeted)} targeted, all of them ignored; "
            "widen --target or narrow --ignore"
        )
    return chosen


def covered(names: Sequence[str], selector: str) -> list[str]:
    """The names that one selector covers, at least one.

    Raises:
        UsageError: It covers none, or is an invalid regular expression.
    """
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(
                f"selector {selector!r} is not a regular expression: {error}"
            ) from error
    else:
        pattern = re.compile(fnmatch.translate(selector))
    found = [name for name in names if name == selector or pattern.fullmatch(name)]
    if not found:
        near = ", ".join(near_misses(names, selector))
        raise UsageError(
            f"selector {selector!r} matches none of {len(names)} linears; near misses: {near}"
        )
    return found


def near_misses(names: Iterable[str], selector: str) -> list[str]:
    """What was probably meant: the closest names, those that differ in a number given as a glob."""
    families = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    written = re.sub(r"\.\d+\.", ".*.", selector.removeprefix("re:").replace("\\.", "."))
    return difflib.get_close_matches(written, families, n=NEAR_MISSES, cutoff=0.0)
