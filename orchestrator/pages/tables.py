"""Formatting of numbers, and tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.pages.markup import Markup, element, joined, scrolling

DASH = "–"
"""Placeholder for a missing value."""
LONGEST_LIST = 12


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def fraction(value: float | None) -> str:
    """Format with four decimal places, as on the command line."""
    return DASH if value is None else f"{value:.4f}"


def significant(value: float | None) -> str:
    """Format with three significant digits; four from 1,000 to 10,000, where values are counts."""
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
    """Format the median, with the range if values differ."""
    if not values:
        return DASH
    least, greatest = min(values), max(values)
    if shown(least) == shown(greatest):
        return shown(least)
    return f"{shown(float(np.median(values)))} ({shown(least)} to {shown(greatest)})"


def plain(value: Any) -> str:
    """Format a JSON value for reading."""
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
    """Flatten nested objects, with dotted names; empty ones are omitted."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def breakable(name: str) -> Markup:
    """Allow line breaks in a dotted name after each dot."""
    parts = [f"{part}." for part in name.split(".")]
    parts[-1] = parts[-1][:-1]
    return joined(each for part in parts for each in (part, element("wbr")))


def head(text: str, kind: str = "") -> Markup:
    return element("th", text, scope="col", class_=kind or None)


def row_head(text: str | Markup, kind: str = "") -> Markup:
    return element("th", text, scope="row", class_=kind or None)


def cell(text: str | None, kind: str = "", *, value: float | None = None) -> Markup:
    """Make a cell; `value` is the sort key if the text is less exact."""
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
    """Make a table that scrolls separately if it is wider than the page."""
    inner = element(
        "table",
        element("thead", element("tr", *heads)) if heads else None,
        element("tbody", *(element("tr", *row) for row in rows)),
        class_="sortable" if is_sortable else None,
    )
    return scrolling(inner, label)


def pairs(values: Mapping[str, Any], *, label: str) -> Markup:
    """Make a table of names and values."""
    rows = [[row_head(name), cell(plain(value), "wide")] for name, value in values.items()]
    return table([], rows, label=label)


def bar(share: float, of: float = 1.0) -> Markup:
    """Make a cell with a bar of `share` over a bar of `of`, both as fractions of the cell's
    width."""
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
