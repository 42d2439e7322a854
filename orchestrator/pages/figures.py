"""SVG figures, drawn by hand; colours come from the style sheet, so they follow light and dark
mode."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.pages.markup import Markup, element, joined
from orchestrator.readable import size

POINTS = 64
"""Number of points of a curve; denser at small ranks, where it bends."""
NINES = 4
"""Upper end of the scale of a curve, in nines: 0.9999."""
FAINTEST = 0.1
"""Opacity of the cell with the least kept fraction; a linear kept completely has 1."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Cell of the heat map."""

    kept: float
    is_dense: bool
    says: str


def heat_map(
    rows: Sequence[str],
    blocks: Sequence[int],
    cells: Mapping[tuple[str, int], Cell],
    label: str,
    *,
    axis: str = "block",
) -> Markup:
    """Draw the kept fraction of every role (rows) in every block (columns), darker for more.

    A dot marks a dense linear; an empty frame marks a linear that is not targeted.

    Args:
        axis: Meaning of the columns' numbers, written beside them.
    """
    left = 9 + 7.2 * max(map(len, rows))
    wide = min(max((930 - left) / len(blocks), 9), 36)
    high, low = 22, scale_floor([each.kept for each in cells.values()])
    drawn = []
    for y, role in enumerate(rows):
        middle = y * high + high / 2
        drawn.append(text(role, 0, middle + 4, class_="role"))
        for x, block in enumerate(blocks):
            drawn.append(
                _cell(
                    cells.get((role, block)),
                    x=left + x * wide,
                    y=y * high,
                    wide=wide,
                    high=high,
                    low=low,
                )
            )
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * wide >= 20)
    bottom = len(rows) * high
    for x, block in enumerate(blocks):
        if block % step == 0:
            center = left + (x + 0.5) * wide
            drawn.append(text(str(block), center, bottom + 14, text_anchor="middle"))
    drawn.append(text(axis, left - 9, bottom + 14, text_anchor="end"))
    return svg(left + len(blocks) * wide, bottom + 18, label, *drawn, is_fixed=True)


def _cell(cell: Cell | None, *, x: float, y: float, wide: float, high: float, low: float) -> Markup:
    box = {
        "x": rounded(x + 0.75),
        "y": y + 0.75,
        "width": rounded(wide - 1.5),
        "height": high - 1.5,
    }
    if cell is None:
        return element("rect", element("title", "not targeted"), class_="empty", rx=1, **box)
    opacity = rounded(strength(cell.kept, low))
    shown = element("rect", class_="hue", fill_opacity=opacity, rx=1, **box)
    if not cell.is_dense:
        return element("g", element("title", cell.says), shown)
    dot = element("circle", cx=rounded(x + wide / 2), cy=y + high / 2, r=2, class_="paper")
    return element("g", element("title", cell.says), shown, dot)


def heat_legend(kept: Sequence[float], *, has_empty: bool) -> Markup:
    """Draw the scale of `heat_map` and its two symbols."""
    low, steps, wide = scale_floor(kept), 10, 17
    drawn = []
    for step in range(steps):
        value = low + (1 - low) * (step + 0.5) / steps
        box = {"x": step * wide, "width": wide, "height": 12}
        drawn.append(
            element("rect", class_="hue", fill_opacity=rounded(strength(value, low)), **box)
        )
    end = steps * wide
    drawn += [
        text(f"{low:g}", 0, 27),
        text("kept", end / 2, 27, text_anchor="middle"),
        text("1", end, 27, text_anchor="end"),
        element("rect", x=end + 22, width=16, height=12, rx=1, class_="hue"),
        element("circle", cx=end + 30, cy=6, r=2, class_="paper"),
        text("dense", end + 44, 10),
    ]
    if has_empty:
        drawn += [
            element("rect", x=end + 92.5, y=0.5, width=15, height=11, rx=1, class_="empty"),
            text("not targeted", end + 114, 10),
        ]
    return svg(end + 190, 32, "scale of the heat map", *drawn, is_fixed=True)


def scale_floor(kept: Sequence[float]) -> float:
    """Return the lower end of the scale: the tenth below the least kept fraction, below 1 in any
    case."""
    return min(math.floor(10 * min(kept, default=0.0)) / 10, 0.9)


def strength(kept: float, low: float) -> float:
    """Opacity of a cell."""
    return FAINTEST + (1 - FAINTEST) * min(max((kept - low) / (1 - low), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Line:
    """Curve of a small multiple."""

    block: int
    sizes: np.ndarray
    """Ranks 1, 2, ..., or densities above 0; ascending."""
    shares: np.ndarray
    """Fraction of the energy captured at each size."""
    chosen: float | None
    """Rank or density of the linear, if it is on the curve."""
    says: str

    @property
    def chosen_share(self) -> float | None:
        """Fraction of the energy captured at the chosen size."""
        if self.chosen is None:
            return None
        return float(np.interp(self.chosen, self.sizes, self.shares))


def energy_lines(lines: Sequence[Line], *, break_even: int | None, label: str) -> Markup:
    """Draw the energy fraction over rank or density, one line per block from light to dark.

    The scale is logarithmic in the lost energy: 0 to 0.9 has the length of 0.9 to 0.99, since
    losses matter even where the captured fraction is close to 1.
    """
    wide, high, left = 250.0, 160.0, 44.0
    longest = max(float(line.sizes[-1]) for line in lines)

    def x(size: float) -> float:
        return rounded(left + (wide - left) * size / longest)

    def y(share: float) -> float:
        return rounded(6 + (high - 6) * (1 + math.log10(max(1 - share, 10.0**-NINES)) / NINES))

    drawn = []
    for nines in range(NINES + 1):
        share = 1 - 10.0**-nines
        drawn.append(element("path", d=f"M{left} {y(share)}H{wide}", class_="axis"))
        drawn.append(text(f"{share:.{nines}f}", left - 6, y(share) + 4, text_anchor="end"))
    for tick in even_ticks(0, longest, most_ticks=4):
        drawn.append(text(f"{tick:g}", x(tick), high + 15, text_anchor="middle"))
    if break_even is not None and break_even <= longest:
        title = element("title", f"break-even rank {break_even:,}")
        drawn.append(element("path", title, d=f"M{x(break_even)} 6V{high}", class_="mark"))
    ordered = sorted(lines, key=lambda line: line.block)
    for n, line in enumerate(ordered):
        opacity = rounded(0.2 + 0.8 * n / max(len(ordered) - 1, 1))
        spaced = (len(line.shares) - 1) * np.linspace(0, 1, POINTS) ** 1.5
        at = np.unique(spaced.round().astype(int))
        pairs = zip(line.sizes[at].tolist(), line.shares[at].tolist(), strict=True)
        points = " ".join(f"{x(size)},{y(share)}" for size, share in pairs)
        title = element("title", line.says)
        drawn.append(
            element("polyline", title, points=points, class_="line", stroke_opacity=opacity)
        )
    for line in ordered:
        if line.chosen is not None and line.chosen_share is not None:
            at_point = {"cx": x(line.chosen), "cy": y(line.chosen_share)}
            title = element("title", line.says)
            drawn.append(element("circle", title, r=2.2, class_="other", **at_point))
    return svg(wide, high + 19, label, *drawn)


@dataclass(frozen=True, slots=True)
class Point:
    """One run in a scatter plot."""

    name: str
    x: float
    y: float
    is_best: bool = True
    """False for a point that is drawn faintly."""


def scatter(points: Sequence[Point], *, level: float | None, label: str) -> Markup:
    """Draw perplexity (logarithmic) over kept fraction; `level` is the perplexity of the dense
    model."""
    wide, high, left = 460.0, 260.0, 44.0
    heights = [math.log(point.y) for point in points] + ([math.log(level)] if level else [])
    low, top = min(heights), max(heights)
    margin = max(0.12 * (top - low), 0.05)
    low, top = low - margin, top + margin
    least, most = min(point.x for point in points), max(point.x for point in points)
    pad = max(0.12 * (most - least), 0.02)
    least, most = least - pad, most + pad

    def x(kept: float) -> float:
        return left + (wide - left) * (kept - least) / (most - least)

    def y(value: float) -> float:
        return 6 + (high - 6) * (top - math.log(value)) / (top - low)

    drawn = [element("path", d=f"M{left} 6V{high}H{wide}", class_="axis")]
    for value in log_ticks(math.exp(low), math.exp(top)):
        height = rounded(y(value))
        drawn.append(element("path", d=f"M{left} {height}H{wide}", class_="axis"))
        drawn.append(text(f"{value:,.4g}", left - 6, height + 4, text_anchor="end"))
    for kept in even_ticks(least, most):
        drawn.append(text(f"{kept:.3g}", x(kept), high + 16, text_anchor="middle"))
    if level:
        height = rounded(y(level))
        drawn.append(element("path", d=f"M{left} {height}H{wide}", class_="mark"))
        drawn.append(text(f"dense {level:.2f}", wide, height - 5, text_anchor="end"))
    for point in points:
        says = f"{point.name}: kept {point.x:.4f}, perplexity {point.y:.2f}"
        drawn += _named(point, x(point.x), y(point.y), says=says, wide=wide)
    drawn.append(text("kept fraction of the targeted linears", wide, high + 34, text_anchor="end"))
    return svg(wide, high + 38, label, *drawn, is_fixed=True)


def retention(points: Sequence[Point], *, label: str) -> Markup:
    """Draw retention over bytes, with the frontier as a line."""
    wide, high, left = 460.0, 260.0, 44.0
    largest = max(point.x for point in points)
    amount, unit = size(largest).split()
    scale = 1000.0 ** round(math.log(largest / float(amount), 1000))
    least, most = _padded([point.x / scale for point in points], 0.02)
    low, top = _padded([100 * point.y for point in points], 1.0)

    def x(stored: float) -> float:
        return rounded(left + (wide - left) * (stored / scale - least) / (most - least))

    def y(kept: float) -> float:
        return rounded(6 + (high - 6) * (top - 100 * kept) / (top - low))

    drawn = [element("path", d=f"M{left} 6V{high}H{wide}", class_="axis")]
    for percent in even_ticks(low, top):
        height = y(percent / 100)
        drawn.append(element("path", d=f"M{left} {height}H{wide}", class_="axis"))
        drawn.append(text(f"{percent:.4g}%", left - 6, height + 4, text_anchor="end"))
    for stored in even_ticks(least, most):
        drawn.append(text(f"{stored:.4g}", x(stored * scale), high + 16, text_anchor="middle"))
    best = sorted((point.x, point.y) for point in points if point.is_best)
    steps = "".join(f"H{x(stored)}V{y(kept)}" for stored, kept in best)
    drawn.append(element("path", d=f"M{x(best[0][0])} {y(best[0][1])}{steps}", class_="line"))
    for point in points:
        says = f"{point.name}: {point.x:,.0f} bytes, retention {point.y:.1%}"
        # names above the line
        drawn += _named(point, x(point.x), y(point.y), says=says, wide=wide, below=-6)
    drawn.append(text(f"bytes of the weights, {unit}", wide, high + 34, text_anchor="end"))
    return svg(wide, high + 38, label, *drawn, is_fixed=True)


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return a range around values, wider than theirs by an eighth or `least` at each end."""
    pad = max(0.12 * (max(values) - min(values)), least)
    return min(values) - pad, max(values) + pad


def _named(
    point: Point, x: float, y: float, *, says: str, wide: float, below: float = 4
) -> list[Markup]:
    """Draw a point with its name, to the left if there is no room to the right.

    Args:
        below: Pixels from the point down to the base line of the name.
    """
    at = {"cx": rounded(x), "cy": rounded(y)}
    opacity = None if point.is_best else 0.35
    circle = element(
        "circle", element("title", says), r=4, class_="hue", fill_opacity=opacity, **at
    )
    is_right = at["cx"] > wide - 7 * len(point.name) - 10
    anchor, shift = ("end", -8) if is_right else ("start", 8)
    where = at["cx"] + shift, at["cy"] + below
    return [circle, text(point.name, *where, text_anchor=anchor, class_="name")]


def even_ticks(least: float, most: float, most_ticks: int = 8) -> list[float]:
    """Return round numbers at equal distances, at most `most_ticks`."""
    steps = (digit * 10.0**power for power in range(-3, 9) for digit in (1, 2, 5))
    step = next(each for each in steps if (most - least) / each < most_ticks - 0.1)
    return [n * step for n in range(math.ceil(least / step), math.floor(most / step) + 1)]


def log_ticks(least: float, most: float) -> list[float]:
    """Return powers of ten times 1, 2, 3 and 5, with a finer step if few of them are in range."""
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    for digits in ((1, 10), (1, 2, 5), (1, 2, 3, 5, 7), range(10, 100, 5), range(100, 1000, 5)):
        scale = 10 ** (len(str(digits[-1])) - 1) if isinstance(digits, range) else 1
        ticks = sorted({d / scale * 10.0**n for n in decades for d in digits})
        inside = [tick for tick in ticks if least <= tick <= most]
        if len(inside) >= 3:
            return inside
    return inside


def text(shown: str, x: float, y: float, **attributes: str) -> Markup:
    return element("text", shown, x=rounded(x), y=rounded(y), **attributes)


def svg(wide: float, high: float, label: str, *drawn: Markup, is_fixed: bool = False) -> Markup:
    """Compose a drawing; a fixed one keeps its size and scrolls if the page is narrow."""
    size = {"width": rounded(wide), "height": rounded(high)} if is_fixed else {}
    return element(
        "svg",
        joined(drawn),
        viewBox=f"0 0 {rounded(wide)} {rounded(high)}",
        role="img",
        aria_label=label,
        **size,
    )


def rounded(value: float) -> float:
    """Round to hundredths of a pixel."""
    return round(value, 2)
