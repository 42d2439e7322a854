"""Section of a report about the experts of a mixture: a map of their kept fraction, and tokens."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from orchestrator.pages import figures, tables
from orchestrator.pages.figures import Cell
from orchestrator.pages.linears import LinearRow, kept_of, place
from orchestrator.pages.markup import Markup, element, scrolling, section
from orchestrator.pages.tables import head, number, row_head


def experts_map(report: Mapping[str, Any], found: Sequence[LinearRow]) -> Markup | None:
    """Section with the kept fraction of each expert by block, and the tokens routed to experts.

    Args:
        report: `experts` has the calibration tokens of every expert by its module's name,
            `model.layers.3.mlp.experts.17`, and `warnings` about experts with few.
    """
    tokens: Mapping[str, int] = report.get("experts", {}).get("tokens", {})
    linears: dict[str, list[LinearRow]] = {name: [] for name in tokens}
    for entry in found:
        expert = entry.name.rpartition(".")[0]
        if expert in linears:
            linears[expert].append(entry)
    cells: dict[tuple[str, int], Cell] = {}
    blocks: dict[str, list[int]] = {}
    for name, count in tokens.items():
        module, _, expert = name.rpartition(".")
        row, kept = f"block {place(module)[0]}", kept_of(linears[name])
        blocks.setdefault(row, []).append(count)
        if kept is not None:
            says = f"{name}: kept {kept:.4f} of {len(linears[name])} linears, {count:,} tokens"
            if all(entry.form == "dropped" for entry in linears[name]):
                says = f"{name}: dropped, {count:,} tokens"
            if bases := {entry.facts["basis"] for entry in linears[name] if _is_tied(entry)}:
                first = min(bases).rsplit(".", 2)[1]
                says = f"{name}: has the weights of expert {first}, {count:,} tokens"
            is_dense = all(entry.form == "dense" for entry in linears[name])
            cells[row, int(expert)] = Cell(kept, is_dense, says)
    if not cells:
        return None
    numbers = sorted({int(name.rpartition(".")[2]) for name in tokens})
    kept_fractions = [cell.kept for cell in cells.values()]
    label = "kept fraction by block and expert; the table of all linears has the numbers"
    drawn = figures.heat_map([*blocks], numbers, cells, label, axis="expert")
    rows = [
        [row_head(row), *(number(f"{each:,}", each) for each in _spread(counts))]
        for row, counts in blocks.items()
    ]
    heads = [head("tokens of experts"), *(head(name, "n") for name in ("least", "median", "most"))]
    return section(
        "Experts",
        element(
            "p",
            "Stored values over dense values of the linears of each expert. Hover over a cell for "
            "its numbers. The table has the calibration tokens that the router sent to an expert.",
        ),
        element(
            "figure",
            scrolling(drawn, "map of experts"),
            element(
                "figcaption",
                figures.heat_legend(kept_fractions, has_empty=len(cells) < len(tokens)),
            ),
        ),
        *(
            element("p", warning, class_="said")
            for warning in report["experts"].get("warnings", ())
        ),
        tables.table(heads, rows, label="calibration tokens of experts by block"),
    )


def _is_tied(entry: LinearRow) -> bool:
    """Test if a linear has the weight of another expert's."""
    return entry.form == "tied" and bool(entry.facts.get("basis"))


def _spread(counts: Sequence[int]) -> tuple[int, int, int]:
    return min(counts), round(median(counts)), max(counts)
