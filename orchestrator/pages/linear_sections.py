"""Sections of a report about linears: maps, budget, curves, numerics, table."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.pages import figures, tables
from orchestrator.pages.linears import (
    LinearRow,
    by_role,
    energy_lines_of,
    heat_cells,
    place,
    size_at,
    total,
)
from orchestrator.pages.markup import Markup, element, scrolling, section
from orchestrator.pages.tables import DASH, cell, head, number, row_head

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "rank": ("rank", tables.count),
    "nonzeros": ("nonzeros", tables.count),
    "basis": ("basis of", lambda name: _basis_of(name)),
    "weight_error": ("weight error", tables.significant),
    "activation_error": ("activation error", tables.significant),
}
"""Optional columns of the table of linears, shown if any linear has the field."""
SHARED = " A basis shared by several linears counts for the first of them, which stores it."


def heat_map(found: Sequence[LinearRow], not_targeted: Sequence[str]) -> Markup | None:
    """Section with the kept fraction by block and role."""
    cells = heat_cells(found)
    if not cells:
        return None
    places = [*cells, *((role, block) for block, role in map(place, not_targeted))]
    blocks = sorted({block for _, block in places if block is not None})
    roles = list(dict.fromkeys(role for role, block in places if block is not None))
    kept = [each.kept for each in cells.values()]
    has_empty = len(cells) < len(roles) * len(blocks)
    label = "kept fraction by block and role; the table of all linears has the numbers"
    return section(
        "Kept fraction by linear",
        element(
            "p",
            "Stored values over dense values of each linear, by block and role. Hover over a cell "
            "for its numbers; the table of all linears lists them."
            + (SHARED if any(entry.facts.get("basis") for entry in found) else ""),
        ),
        element(
            "figure",
            scrolling(figures.heat_map(roles, blocks, cells, label), "heat map"),
            element("figcaption", figures.heat_legend(kept, has_empty=has_empty)),
        ),
    )


def budget(found: Sequence[LinearRow]) -> Markup | None:
    """Section with the values of each role before and after, on one scale."""
    roles = {
        role: (dense, stored, sum(entry.form == "dense" for entry in same))
        for role, same in by_role(found).items()
        if (dense := total([entry.dense_values for entry in same]))
        and (stored := total([entry.values for entry in same])) is not None
    }
    if not roles:
        return None
    widest = max(dense for dense, _, _ in roles.values())
    everything = sum(stored for _, stored, _ in roles.values())
    rows = [
        [
            row_head(role, "id"),
            number(tables.count(dense), dense),
            number(tables.count(stored), stored),
            number(tables.fraction(stored / dense), stored / dense),
            number(f"{stored / everything:.1%}" if everything else DASH),
            number(tables.count(left_dense)),
            tables.bar(stored / widest, dense / widest),
        ]
        for role, (dense, stored, left_dense) in roles.items()
    ]
    named = ("values before", "stored", "kept", "of the budget", "dense")
    heads = [head("role"), *(head(name, "n") for name in named), head("stored over before", "bar")]
    return section("Budget by role", tables.table(heads, rows, label="budget by role"))


def rank_curves(found: Sequence[LinearRow], shares: Mapping[str, np.ndarray]) -> Markup | None:
    """Section with energy over rank for each role, and a summary table."""
    return _curves(
        energy_lines_of(shares, found),
        {role: _break_even(same) for role, same in by_role(found).items()},
        "rank",
        "Fraction of a linear's energy (squared singular values in the method's norm) in its "
        "leading ranks, on a logarithmic scale of the loss. One line per block, the first "
        "lightest; a point marks the chosen rank, the dashed line break-even, from which on "
        "factors save nothing.",
    )


def density_curves(found: Sequence[LinearRow], shares: Mapping[str, np.ndarray]) -> Markup | None:
    """Section with energy over density for each role, and a summary table."""
    return _curves(
        energy_lines_of(shares, found, is_sparse=True),
        {},
        "density",
        "Fraction of a linear's output energy on the calibration tokens in its most important "
        "entries, on a logarithmic scale of the loss. One line per block, the first lightest; a "
        "point marks the chosen density.",
    )


def _curves(
    lines: Mapping[str, Sequence[figures.Line]],
    even: Mapping[str, int | None],
    size: str,
    says: str,
) -> Markup | None:
    if not lines:
        return None
    multiples = [
        element(
            "figure",
            element("h3", role),
            figures.energy_lines(
                same,
                break_even=even.get(role),
                label=f"{role}: energy fraction over {size}, one line per block",
            ),
        )
        for role, same in lines.items()
    ]
    rows = [_energy_row(role, same, size) for role, same in lines.items()]
    named = (f"{size} for 0.9", f"{size} for 0.99", f"chosen {size}", "its energy fraction")
    heads = [head("role"), *(head(name, "n") for name in named)]
    return section(
        f"Energy over {size}",
        element("p", says),
        element("div", *multiples, class_="multiples"),
        element("p", "Median over the blocks, with range.", class_="soft"),
        tables.table(heads, rows, label=f"energy and {size} by role"),
    )


def _break_even(same: Sequence[LinearRow]) -> int | None:
    """Break-even rank of a role, if its linears have one and share no basis; a group has another
    one."""
    ranks = {entry.break_even for entry in same}
    is_alone = not any(entry.facts.get("basis") for entry in same)
    return ranks.pop() if len(ranks) == 1 and is_alone else None


def _energy_row(role: str, lines: Sequence[figures.Line], size: str) -> list[Markup]:
    at = [[size_at(line, share) for line in lines] for share in (0.9, 0.99)]
    sizes = [*at, [line.chosen for line in lines]]
    shares = [share for line in lines if (share := line.chosen_share) is not None]
    shown = tables.count if size == "rank" else "{:.3g}".format
    return [
        row_head(role, "id"),
        *(number(tables.spread([s for s in each if s is not None], shown)) for each in sizes),
        number(tables.spread(shares, tables.fraction)),
    ]


def numerics(found: Sequence[LinearRow]) -> Markup | None:
    """Section with the numerical reports of the decompositions, over all linears."""
    reported: dict[str, list[Any]] = {}
    for entry in found:
        for name, value in tables.flat(entry.facts.get("numerics", {})).items():
            reported.setdefault(name, []).append(value)
    rows = []
    for name, values in reported.items():
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            shown = tables.spread(values)
        else:
            counted = Counter(tables.plain(value) for value in values).most_common(8)
            shown = ", ".join(f"{value} ({times:,})" for value, times in counted)
        rows.append([row_head(name.replace("_", " ")), cell(shown, "wide")])
    if not rows:
        return None
    return section(
        "Numerics",
        element(
            "p",
            "Measurements of the decompositions: median and range of numbers, and counts of words.",
        ),
        tables.table([], rows, label="numerics"),
    )


def every_linear(found: Sequence[LinearRow]) -> Markup | None:
    """Table with one row per linear."""
    if not found:
        return None
    given = [name for name in COLUMNS if any(entry.facts.get(name) for entry in found)]
    heads = [head("linear", "long"), head("shape", "n"), head("form")]
    heads += [head(name, "n") for name in ("break-even", "stored", "kept")]
    heads += [head(COLUMNS[name][0], "" if name == "basis" else "n") for name in given]
    forms = Counter(entry.form.replace("_", " ") for entry in found)
    counted = ", ".join(f"{times:,} {form}" for form, times in forms.most_common())
    return section(
        "Every linear",
        element(
            "p",
            f"{len(found):,} targeted linears: {counted}. Errors are squared and relative: "
            "|W − W′|² / |W|² of the weight, Σ|Wx − W′x|² / Σ|Wx|² of its outputs on the "
            "calibration tokens. Click on a heading to sort.",
        ),
        tables.table(
            heads, [_row(entry, given) for entry in found], label="every linear", is_sortable=True
        ),
    )


def _basis_of(name: str) -> str:
    """Name the linear of the group that stores the basis: the same role in this block, or that of
    an expert of the same block."""
    block, role = place(name)
    if "*" in role:
        return ".".join(name.rsplit(".", 2)[1:])
    return name if block is None else f"block {block}"


def _row(entry: LinearRow, given: Sequence[str]) -> list[Markup]:
    shape = f"{entry.shape[0]} × {entry.shape[1]}" if entry.shape else DASH
    cells = [
        row_head(entry.name, "id long"),
        number(shape, entry.dense_values),
        cell(entry.form.replace("_", " "), "word"),
        number(tables.count(entry.break_even), entry.break_even),
        number(tables.count(entry.values), entry.values),
        number(tables.fraction(entry.kept), entry.kept),
    ]
    for name in given:
        value = entry.facts.get(name)
        says = DASH if value in (None, "") else COLUMNS[name][1](value)
        cells.append(cell(says, "word") if name == "basis" else number(says, value))
    return cells
