"""Drawings of the live page: the blocks of a model by stage, and losses over time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.pages.figures import even_ticks, log_ticks, rounded, svg, text
from orchestrator.pages.markup import Markup, element

SAYS = {
    "earlier": "committed by an earlier run",
    "busy": "in its last call",
    "part": "some of its units are committed",
    "done": "committed",
    "lost": "its last call failed",
}
"""Meanings of the levels of a block."""
_NAMED = {"calibrated": {"done": "all chunks have passed"}}


def block_map(
    rows: Mapping[str, Mapping[int, str]], blocks: int, shares: Mapping[str, float], label: str
) -> Markup:
    """Draw every block (columns) in every stage (rows) by its level.

    Args:
        rows: By stage, the levels of its blocks; others are drawn as frames.
        shares: By stage that works on all blocks at once, its completed fraction.
    """
    left = 9 + 7.2 * max(map(len, rows))
    wide, high = min(max((930 - left) / blocks, 9), 36), 22
    drawn = []
    for y, (stage, levels) in enumerate(rows.items()):
        drawn.append(text(stage, 0, y * high + high / 2 + 4, class_="role"))
        for block in range(blocks):
            box = {
                "x": rounded(left + block * wide + 0.75),
                "y": y * high + 0.75,
                "width": rounded(wide - 1.5),
                "height": high - 1.5,
                "rx": 1,
            }
            level, share = levels.get(block), shares.get(stage, 0.0)
            says = _NAMED.get(stage, {}).get(level or "") or SAYS.get(level or "", "not reached")
            title = element("title", f"block {block}, {stage}: {says}")
            if level is None and share > 0:
                opacity = rounded(0.1 + 0.9 * share)
                drawn.append(element("rect", title, class_="hue", fill_opacity=opacity, **box))
            else:
                drawn.append(element("rect", title, class_=level or "empty", **box))
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if step * wide >= 20)
    bottom = len(rows) * high
    for block in range(0, blocks, step):
        center = left + (block + 0.5) * wide
        drawn.append(text(str(block), center, bottom + 14, text_anchor="middle"))
    drawn.append(text("block", left - 9, bottom + 14, text_anchor="end"))
    return svg(left + blocks * wide, bottom + 18, label, *drawn, is_fixed=True)


@dataclass(frozen=True, slots=True)
class LossLine:
    """One line of losses."""

    points: Sequence[tuple[float, float]]
    """Time (epochs or steps) and loss; losses that are not positive and finite are left out."""
    says: str
    opacity: float = 1.0
    is_other: bool = False
    """True for the second colour."""
    best: float | None = None
    """Time of the kept state."""
    name: str = ""
    """Name at the right end of the line."""

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """Points that a logarithmic scale has."""
        return [(at, loss) for at, loss in self.points if math.isfinite(loss) and loss > 1e-30]


def loss_lines(lines: Sequence[LossLine], *, unit: str, label: str) -> Markup | None:
    """Draw losses, logarithmic, over epochs or steps; None if there is no loss to draw."""
    points = [point for line in lines for point in line.drawn]
    if not points:
        return None
    wide, high, left = 380.0, 190.0, 52.0
    right = wide - 9 - 6.5 * max(len(line.name) for line in lines)
    last = max(max(at for at, _ in points), 1.0)
    logs = [math.log(loss) for _, loss in points]
    margin = max(0.08 * (max(logs) - min(logs)), 0.01)
    low, top = min(logs) - margin, max(logs) + margin

    def x(at: float) -> float:
        return rounded(left + (right - left) * at / last)

    def y(loss: float) -> float:
        return rounded(6 + (high - 6) * (top - math.log(loss)) / (top - low))

    drawn = [element("path", d=f"M{left} 6V{high}H{rounded(right)}", class_="axis")]
    for value in _ticks(math.exp(low), math.exp(top), y):
        drawn.append(element("path", d=f"M{left} {y(value)}H{rounded(right)}", class_="axis"))
        drawn.append(text(f"{value:,.3g}", left - 6, y(value) + 4, text_anchor="end"))
    for at in even_ticks(0, last, most_ticks=6):
        if at == int(at):
            drawn.append(text(f"{at:,g}", x(at), high + 15, text_anchor="middle"))
    drawn.append(text(unit, right, high + 30, text_anchor="end"))
    ends = _apart([y(line.drawn[-1][1]) if line.name and line.drawn else None for line in lines])
    for line, end in zip(lines, ends, strict=True):
        drawn += _line(line, x=x, y=y)
        if end is not None:
            drawn.append(text(line.name, right + 6, end + 4, class_="name"))
    return svg(wide, high + 34, label, *drawn)


def _ticks(least: float, most: float, y: Callable[[float], float]) -> list[float]:
    """Return round numbers whose heights are apart; even ones within a decade."""
    if most < 10 * least:
        scale = 10.0 ** math.floor(math.log10(most))
        found = [scale * tick for tick in even_ticks(least / scale, most / scale, most_ticks=6)]
    else:
        found = log_ticks(least, most)
    kept: list[float] = []
    for tick in found:
        if not kept or y(kept[-1]) - y(tick) >= 14:
            kept.append(tick)
    return kept


def _line(
    line: LossLine, *, x: Callable[[float], float], y: Callable[[float], float]
) -> list[Markup]:
    """Draw one line, with dots at a single point and at the kept state."""
    kind, found = ("line second" if line.is_other else "line"), line.drawn
    title = element("title", line.says)
    opacity = rounded(line.opacity)
    points = " ".join(f"{x(at)},{y(loss)}" for at, loss in found)
    drawn = [element("polyline", title, points=points, class_=kind, stroke_opacity=opacity)]
    dots = [point for point in found if point[0] == line.best or len(found) == 1]
    fill = "other" if line.is_other else "hue"
    for at, loss in dots:
        place = {"cx": x(at), "cy": y(loss), "r": 2.6, "fill_opacity": opacity}
        drawn.append(element("circle", title, class_=fill, **place))
    return drawn


def _apart(heights: Sequence[float | None], least: float = 12.0) -> list[float | None]:
    """Move heights of names that would overlap down."""
    moved: list[float | None] = list(heights)
    placed: list[float] = []
    for n, height in sorted(enumerate(heights), key=lambda each: each[1] or 0.0):
        if height is not None:
            lowest = placed[-1] + least if placed else height
            moved[n] = max(height, lowest)
            placed.append(max(height, lowest))
    return moved
