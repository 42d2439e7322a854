"""Timing of alternatives in turns, and comparison of results with targets."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Measured quantity with its reference."""

    name: str
    measured: float
    reference: float
    unit: str
    ratio: float
    """Measured over reference; for timings the median over the turns, which is less affected by
    load changes than either time."""
    target: float | None = None
    at_least: bool = False
    """True if the ratio must be at least the target, False if at most."""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def in_turns(
    ways: Mapping[str, Callable[[], Value]], repeats: int, warm_up: int = 0
) -> dict[str, list[Value]]:
    """Return the results of every candidate, measured in turns; warm-up turns are dropped."""
    found: dict[str, list[Value]] = {name: [] for name in ways}
    for turn in range(warm_up + repeats):
        for name, way in ways.items():
            value = way()
            if turn >= warm_up:
                found[name].append(value)
    return found


def compare(
    name: str,
    measured: Sequence[float],
    reference: Sequence[float],
    *,
    unit: str,
    target: float | None = None,
    at_least: bool = False,
) -> Figure:
    """Make the figure of two series measured in turns."""
    ratios = [ours / theirs for ours, theirs in zip(measured, reference, strict=True)]
    return Figure(
        name=name,
        measured=statistics.median(measured),
        reference=statistics.median(reference),
        unit=unit,
        ratio=statistics.median(ratios),
        target=target,
        at_least=at_least,
    )


def print_figures(figures: Sequence[Figure]) -> None:
    rows = [("", "measured", "reference", "ratio", "target", "")]
    for figure in figures:
        sign = "at least" if figure.at_least else "at most"
        rows.append(
            (
                figure.name,
                f"{figure.measured:.4g} {figure.unit}",
                f"{figure.reference:.4g} {figure.unit}",
                f"{figure.ratio:.3f}",
                "" if figure.target is None else f"{sign} {figure.target:g}",
                {None: "", True: "met", False: "missed"}[figure.met],
            )
        )
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip(), flush=True)


def say(text: str) -> None:
    """Print a line of progress with the load of the last minute: other programs disturb timings."""
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {text}", file=sys.stderr)
