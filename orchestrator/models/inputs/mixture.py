"""Sequences of a mixture: their number and length, the part of each source, and their order."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Number and length of sequences."""

    samples: int
    length: int
    fewer: bool
    """True if a short text may give fewer sequences."""
    shorter: bool
    """True if these may be shorter too."""
    stride: int = 1

    def span(self, windows: int) -> int:
        """Windows of a text from the first taken one to the last."""
        return (windows - 1) * self.stride + 1

    def windows(self, tokens: int, length: int) -> int:
        """Number of windows in this many tokens; every stride-th of them is taken."""
        return (tokens // length - 1) // self.stride + 1 if tokens >= length else 0

    def needed(self, weights: Sequence[float]) -> list[int]:
        """Tokens of each source beyond which nothing is read."""
        # the shares of fewer sequences than the limit may be larger by one
        more = int(self.fewer and len(weights) > 1)
        return [self.span(share + more) * self.length for share in apportion(self.samples, weights)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number of sequences by weights, by largest remainders; ties go to the first."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda each: parts[each] - exact[each])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def fit(wanted: Wanted, tokens: Sequence[int], weights: Sequence[float]) -> tuple[int, list[int]]:
    """Return the length of the windows, and the number that each source gives.

    Weights are kept: of fewer windows there are as many as the source allows that is scarcest for
    its weight. If they may be shorter too, they leave the least of a short text. A number
    or a length of 0 means that it is not possible.

    Args:
        tokens: Tokens that were read of each source.
    """
    if not wanted.fewer:
        return wanted.length, apportion(wanted.samples, weights)
    if not wanted.shorter:
        return wanted.length, _most(wanted, tokens, weights)
    pairs = list(zip(tokens, weights, strict=True))
    # to whole tokens, since a quotient of doubles may be just below one
    scarce = min(int(count / (weight * wanted.stride) + 1e-6) for count, weight in pairs)
    total = min(wanted.samples * wanted.length, scarce)
    shortest = min(int(weight * total + 1e-6) for weight in weights)
    windows = ceil(total / max(min(wanted.length, shortest), 1))
    counts = apportion(min(wanted.samples, windows), weights)
    if not all(counts):
        return 0, counts
    fits = (count // wanted.span(part) for count, part in zip(tokens, counts, strict=True))
    return min(wanted.length, *fits), counts


def _most(wanted: Wanted, tokens: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Parts of the largest number of windows that every source has, at most that of `wanted`."""
    there = [wanted.windows(count, wanted.length) for count in tokens]
    # a part is at least its weight less one window
    scarce = (int((have + 1) / weight) for have, weight in zip(there, weights, strict=True))
    for total in range(min(wanted.samples, *scarce), 0, -1):
        parts = apportion(total, weights)
        if all(0 < part <= have for part, have in zip(parts, there, strict=True)):
            return parts
    return [0] * len(there)


def interleave(
    rows: Sequence[Sequence[Sized]], weights: Sequence[float], most: int
) -> list[tuple[int, int]]:
    """Choose rows in turn so that every beginning is mixed by tokens as the weights say.

    The next row is of the source whose tokens, with half of this row, are fewest for its weight; it
    ends at `most` rows, or where that source has no row left.

    Returns:
        Source and place in it, for each row.
    """
    used, taken = [0.0] * len(rows), [0] * len(rows)
    chosen: list[tuple[int, int]] = []

    def due(source: int) -> float:
        is_left = taken[source] < len(rows[source])
        row = len(rows[source][taken[source]]) if is_left else 0
        return (used[source] + row / 2) / weights[source]

    while len(chosen) < most:
        source = min(range(len(rows)), key=due)
        if taken[source] == len(rows[source]):
            break
        used[source] += len(rows[source][taken[source]])
        chosen.append((source, taken[source]))
        taken[source] += 1
    return chosen
