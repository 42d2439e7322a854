"""Numbers as words, and words in rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.pages.markup import Markup, element, joined, scrolling

DASH = "–"
"""Where there is nothing to say."""
LONGEST_LIST = 12


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def fraction(value: float | None) -> str:
    """Four digits behind the point, as the command line has it."""
    return DASH if value is None else f"{value:.4f}"


def significant(value: float | None) -> str:
    """Three digits that count, four from 1 to 10 thousand, where counts are."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1:
        return f"{value:#.3g}"
    return f"{value:,.4g}" if 1 <= abs(value) < 1e4 else f"{value:.2e}"


def rate(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f}"


def spread(values: Sequence[float], shown: Callable[[float], str] = significant) -> str:
    """Median, and least to greatest where they differ."""
    if not values:
        return DASH
    least, greatest = min(values), max(values)
    if shown(least) == shown(greatest):
        return shown(least)
    return f"{shown(float(np.median(values)))} ({shown(least)} to {shown(greatest)})"


def plain(value: Any) -> str:
    """A value out of JSON, for reading."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST:
            return f"{len(value)} values"
        return ", ".join(plain(item) for item in value) or "none"
    return str(value) if value != "" else "empty"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names; empty ones are left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line behind a dot."""
    parts = [f"{part}." for part in name.split(".")]
    parts[-1] = parts[-1][:-1]
    return joined(each for part in parts for each in (part, element("wbr")))


def head(text: str, kind: str = "") -> Markup:
    return element("th", text, scope="col", class_=kind or None)


def row_head(text: str | Markup, kind: str = "") -> Markup:
    return element("th", text, scope="row", class_=kind or None)


def cell(text: str | None, kind: str = "", *, value: float | None = None) -> Markup:
    """A cell; `value` is what it is sorted by where its text says it less exactly."""
    return element("td", text, class_=kind or None, data_value=value)


def number(text: str, value: float | None = None) -> Markup:
    return cell(text, "n", value=value)


def table(
    heads: Sequence[Markup],
    rows: Sequence[Sequence[Markup]],
    *,
    label: str,
    is_sortable: bool = False,
) -> Markup:
    """A table that scrolls within itself where it is wider than the page."""
    inner = element(
        "table",
        element("thead", element("tr", *heads)) if heads else None,
        element("tbody", *(element("tr", *row) for row in rows)),
        class_="sortable" if is_sortable else None,
    )
    return scrolling(inner, label)


def pairs(values: Mapping[str, Any], *, label: str) -> Markup:
    """Names and values, one under another."""
    rows = [[row_head(name), cell(plain(value), "wide")] for name, value in values.items()]
    return table([], rows, label=label)


def bar(share: float, of: float = 1.0) -> Markup:
    """A cell with `share` drawn before `of`, both in parts of the cell's width."""
    drawn = element(
        "svg",
        element("rect", width=_hundredths(of), height=8, class_="hue", fill_opacity=0.16),
        element("rect", width=_hundredths(share), height=8, class_="hue"),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return cell(drawn, "bar")


def _hundredths(share: float) -> float:
    return round(100 * min(max(share, 0.0), 1.0), 2)
