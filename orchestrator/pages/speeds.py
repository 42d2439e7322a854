"""Section with the speed that `bench` measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.pages import tables
from orchestrator.pages.markup import Markup, element, section
from orchestrator.pages.tables import cell, head, number, row_head


def speeds(found: Mapping[str, Any]) -> Markup | None:
    """Tables of whole models and of linears, with reasons where they are slower than dense."""
    if not found.get("whole"):
        return None
    clock = "processor time" if found["clock"] == "processor" else "time"
    says = (
        f"Median {clock} on {found['device']}, models in turn; the least time is that of the "
        "linears alone at the measured rates of products and of memory."
    )
    shown = [element("p", says), _whole(found["whole"])]
    if found["linears"]:
        shown.append(_linears(found["linears"]))
    return section("Speed", *shown)


def _whole(rows: Sequence[Mapping[str, Any]]) -> Markup:
    heads = [head("phase"), head("sequences", "n"), head("length", "n")]
    heads += [head(name, "n") for name in ("dense, ms", "ms", "least, ms", "tokens/s", "speed")]
    lines = []
    for row in rows:
        ours, dense = row["models"]["model"], row["models"].get("against", {})
        lines.append(
            [
                row_head(row["phase"]),
                number(f"{row['batch']:,}", row["batch"]),
                number(f"{row['length']:,}", row["length"]),
                *(
                    number(tables.significant(_scaled(seconds, 1e3)), seconds)
                    for seconds in (
                        dense.get("seconds"),
                        ours["seconds"],
                        ours["least_seconds"],
                    )
                ),
                number(tables.rate(ours["tokens_per_second"]), ours["tokens_per_second"]),
                _speed(row),
                cell("; ".join(row["why"]), "wide"),
            ]
        )
    return tables.table([*heads, head("why slower")], lines, label="speed of the model")


def _linears(rows: Sequence[Mapping[str, Any]]) -> Markup:
    heads = [head("linear"), head("form")]
    heads += [head(name, "n") for name in ("number", "rank", "tokens", "dense, us", "model, us")]
    heads += [head("least, us", "n"), head("speed", "n"), head("why slower")]
    lines = []
    for row in rows:
        outputs, inputs = row["shape"]
        lines.append(
            [
                row_head(f"{row['role']} {outputs:,} × {inputs:,}"),
                cell(row["form"]),
                *(number(f"{row[name]:,}", row[name]) for name in ("count", "rank", "tokens")),
                *(
                    number(tables.significant(_scaled(row[name], 1e6)), row[name])
                    for name in ("dense_seconds", "seconds", "least_seconds")
                ),
                _speed(row),
                cell("; ".join(row["why"]), "wide"),
            ]
        )
    return tables.table(heads, lines, label="speed of linears", is_sortable=True)


def _speed(row: Mapping[str, Any]) -> Markup:
    speed = row.get("speed")
    return number(tables.DASH if speed is None else f"{speed:.2f} ×", speed)


def _scaled(seconds: float | None, by: float) -> float | None:
    return None if seconds is None else by * seconds
