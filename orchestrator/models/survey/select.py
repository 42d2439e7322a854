"""Selection of linears by name patterns.

A selector matches a whole module name. `re:` starts a regular expression that must match the
full name (`re:.*[qk]_proj`). Any other selector is an exact name or, with `*`, `?` or `[...]`, a
glob whose `*` also matches dots (`*.mlp.*`).
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from orchestrator.errors import UsageError

NEAR_MISSES = 3


def select(
    names: Sequence[str],
    target: Iterable[str],
    ignore: Iterable[str] = (),
    *,
    tower: Sequence[str] = (),
) -> list[str]:
    """Names that match a target selector and no ignore selector, in the order of `names`.

    Args:
        names: Linears of the language model.
        tower: Linears of a vision tower, which follow. A selector that matches one of `names` does
            not reach them, so that a tower is compressed only where it is named.

    Raises:
        UsageError: A selector matches no name (near misses are listed), a regular expression is
            invalid, or no name remains.
    """
    targeted = {name for selector in target for name in covered(names, selector, tower)}
    ignored = {name for selector in ignore for name in covered(names, selector, tower)}
    chosen = [name for name in (*names, *tower) if name in targeted and name not in ignored]
    if not chosen:
        raise UsageError(
            f"no linear remains: {len(targeted)} targeted, all of them ignored; "
            "widen --target or narrow --ignore"
        )
    return chosen


def covered(names: Sequence[str], selector: str, tower: Sequence[str] = ()) -> list[str]:
    """Names that one selector matches, at least one; those of a tower if it matches no other.

    Raises:
        UsageError: The selector matches no name, or is an invalid regular expression.
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
    matched = (
        [name for name in part if name == selector or pattern.fullmatch(name)]
        for part in (names, tower)
    )
    found = next(filter(None, matched), [])
    if not found:
        every = [*names, *tower]
        near = ", ".join(near_misses(every, selector))
        raise UsageError(
            f"selector {selector!r} matches none of {len(every)} linears; near misses: {near}"
        )
    return found


def near_misses(names: Iterable[str], selector: str) -> list[str]:
    """Closest names to a selector; names that differ only in a number are merged into a glob."""
    families = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    written = re.sub(r"\.\d+\.", ".*.", selector.removeprefix("re:").replace("\\.", "."))
    return difflib.get_close_matches(written, families, n=NEAR_MISSES, cutoff=0.0)
