"""Retention of tasks over bytes: what a byte of a model buys, and the runs that none exceeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.pages import figures, tables
from orchestrator.pages.evaluations import task_key, task_rows
from orchestrator.pages.markup import Markup, element, section
from orchestrator.pages.sources import Source
from orchestrator.pages.tables import DASH, cell, head, number, row_head
from orchestrator.plan.result import bits_per_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """One model: its size, and the retention of the tasks for which it is known."""

    name: str
    bytes: int | None
    """Bytes of the weights on disk: those of runs with different targets can be compared."""
    bits: float | None
    """Bits per weight of the targeted linears."""
    retention: Mapping[str, float]
    """By task and metric."""
    frontier: tuple[str, ...] = ()
    """Tasks for which the model is on the frontier."""


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell which points (bytes, retention) are on the frontier, in their order; O(n log n).

    A point is, unless another one has at most its bytes and at least its retention. Equal points
    do not exclude each other.
    """
    found, best = set(), -math.inf
    for size, retention in sorted(points, key=lambda point: (point[0], -point[1])):
        if retention > best:
            found.add((size, retention))
            best = retention
    return [point in found for point in points]


def retained(names: Sequence[str], sources: Sequence[Source]) -> list[Retained]:
    """Sizes and retention of runs, and of their dense model first, with the frontier of each task.

    The retention of the dense model is 1. It is left out, and there is no frontier, if runs have
    different dense models: a task has another value of 1 for each.
    """
    found = [
        Retained(
            name=name,
            bytes=source.out_bytes,
            bits=bits_per_weight(source.report),
            retention={
                task_key(row): row["retention"]
                for row in task_rows(source.evaluations)
                if row.get("retention") is not None
            },
        )
        for name, source in zip(names, sources, strict=True)
    ]
    if len({source.report.get("base_fingerprint") for source in sources}) > 1:
        return found
    size = next((source.dense_bytes for source in sources if source.dense_bytes), None)
    whole = dict.fromkeys((key for each in found for key in each.retention), 1.0)
    return _with_frontier([Retained(name="dense", bytes=size, bits=None, retention=whole), *found])


def _with_frontier(models: Sequence[Retained]) -> list[Retained]:
    on: dict[int, list[str]] = {place: [] for place in range(len(models))}
    for key in dict.fromkeys(key for each in models for key in each.retention):
        points = {
            place: (each.bytes, each.retention[key])
            for place, each in enumerate(models)
            if each.bytes is not None and key in each.retention
        }
        for place, is_on in zip(points, frontier([*points.values()]), strict=True):
            if is_on:
                on[place].append(key)
    return [
        Retained(
            name=each.name,
            bytes=each.bytes,
            bits=each.bits,
            retention=each.retention,
            frontier=tuple(on[place]),
        )
        for place, each in enumerate(models)
    ]


def retention_section(names: Sequence[str], sources: Sequence[Source]) -> Markup | None:
    """Table of retention and bytes, and one figure for each task; None if no retention is known."""
    models = retained(names, sources)
    keys = list(dict.fromkeys(key for each in models for key in each.retention))
    if not keys:
        return None
    is_ranked = len(models) > len(names)
    rows = [[*_cells(each, keys), *([_on(each)] if is_ranked else [])] for each in models]
    named = ("bytes of the weights", "bits per weight", *keys)
    heads = [head("run"), *(head(each, "n") for each in named)]
    heads += [head("on the frontier")] if is_ranked else []
    says = (
        "A run is on the frontier of a task if no other, nor the dense model, has at most its "
        "bytes and at least its retention. Differences within the standard errors of a task say "
        "nothing."
        if is_ranked
        else "The runs have different dense models, so that there is no frontier."
    )
    drawn = [_figure(models, key) for key in keys] if is_ranked else []
    return section(
        "Retention over bytes",
        element("p", says),
        tables.table(heads, rows, label="retention over bytes", is_sortable=True),
        *drawn,
    )


def _cells(model: Retained, keys: Sequence[str]) -> list[Markup]:
    kept = [model.retention.get(key) for key in keys]
    return [
        row_head(model.name),
        number(tables.count(model.bytes), model.bytes),
        number(DASH if model.bits is None else f"{model.bits:.3f}", model.bits),
        *(number(DASH if each is None else f"{each:.1%}", each) for each in kept),
    ]


def _on(model: Retained) -> Markup:
    return cell("; ".join(model.frontier) or DASH, "wide")


def _figure(models: Sequence[Retained], key: str) -> Markup | None:
    """Retention of one task over bytes; None with fewer than two known points."""
    points = [
        figures.Point(each.name, each.bytes, each.retention[key], key in each.frontier)
        for each in models
        if each.bytes is not None and key in each.retention
    ]
    if len(points) < 2:
        return None
    return element(
        "figure",
        figures.retention(points, label=f"retention over bytes, {key}"),
        element("figcaption", f"{key}: retention over bytes; the line is the frontier."),
    )
