"""Section with the plans that a search has measured."""

from collections.abc import Mapping
from typing import Any

from orchestrator.pages import tables
from orchestrator.pages.markup import Markup, element, section
from orchestrator.pages.tables import head, number, row_head

DIGITS = 4
"""Decimal places of a loss."""


def searched_plans(found: Mapping[str, Any]) -> Markup | None:
    """Table of all plans in the order of their choice, with their losses and kept fractions.

    Args:
        found: `search` of the report.
    """
    if not found.get("trials"):
        return None
    best, gains = found["loss"], found["gains"]
    gained = ", ".join(f"{gain:.{DIGITS}f} below {name}" for name, gain in gains.items())
    lost = found["not_finite"]
    says = (
        f"Plan {found['best'] + 1} has the least loss, {best:.{DIGITS}f} in nats on "
        f"{found['text']['sequences']} sequences of {found['text']['source']}: {gained}. "
        + (f"{lost} losses were not finite. " if lost else "")
        + "The other columns are kept fractions of the groups of linears."
    )
    heads = [head("plan"), head("origin"), head("loss", "n"), head("above the best", "n")]
    heads += [head(name, "n") for name in found["groups"]]
    rows = [
        [
            row_head(f"{place}"),
            tables.cell(each["origin"]),
            *(_loss(value) for value in (each["loss"], _above(each["loss"], best))),
            *(number(tables.fraction(kept), kept) for kept in each["kept"]),
        ]
        for place, each in enumerate(found["trials"], start=1)
    ]
    table = tables.table(heads, rows, label="plans of the search", is_sortable=True)
    return section("Plans of the search", element("p", says), table)


def _above(loss: float | None, best: float) -> float | None:
    return None if loss is None else loss - best


def _loss(value: float | None) -> Markup:
    return number(tables.DASH if value is None else f"{value:.{DIGITS}f}", value)
