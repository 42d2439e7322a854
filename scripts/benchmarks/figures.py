"""Timing several ways in turns, and saying what came out beside what was to be reached."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity beside its reference."""

    name: str
    measured: float
    reference: float
    unit: str
    ratio: float
    """Measured over reference; of timings the median over the turns, which a change of the
    machine's load between turns moves less than either time."""
    target: float | None = None
    at_least: bool = False
    """Whether the ratio must be at least the target; at most otherwise."""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def in_turns(
    ways: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """What every way gives, way by way within a turn, turn after turn, the first ones dropped."""
    found: dict[str, list[float]] = {name: [] for name in ways}
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
    """The figure of two series measured in turns."""
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
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip(), flush=True)


def say(text: str) -> None:
    """A line of progress, with the load of the last minute: other programs disturb timings."""
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {text}", file=sys.stderr)
