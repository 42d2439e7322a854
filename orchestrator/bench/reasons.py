"""Reasons why a compressed linear is not faster than the dense one; a function of numbers."""

from dataclasses import dataclass

from orchestrator.bench.roofline import Roofline
from orchestrator.plan.allowed_ranks import automatic_multiple

REBUILT = ("sparse", "low_rank_sparse")
"""Forms whose dense weight is made again at every call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLinear:
    """One linear at one number of tokens."""

    out_features: int
    in_features: int
    form: str
    rank: int
    values: int
    """Stored values."""
    tokens: int
    dense: float
    """Seconds of the dense linear."""
    compressed: float
    spread: float
    """The larger of both spreads, over the median."""

    @property
    def speed(self) -> float:
        """Speed over that of the dense linear."""
        return self.dense / self.compressed

    @property
    def kept(self) -> float:
        return self.values / (self.out_features * self.in_features)

    def bounds(self, limits: Roofline) -> tuple[float, float]:
        """Return the least seconds, dense and compressed."""
        moved = self.tokens * (self.out_features + self.in_features)
        dense = limits.seconds(self.tokens, self.out_features * self.in_features, moved)
        inner = 2 * self.tokens * self.rank
        return dense, limits.seconds(self.tokens, self.values, moved + inner)


def reasons(measured: MeasuredLinear, limits: Roofline, calls: float) -> list[str]:
    """Return why a linear is slower than dense, by what its form adds; empty if it is not.

    - form: entries are made a dense weight at every call.
    - launch-bound: the calls that it adds take longer than the smaller weight can save.
    - too small: less than a tenth is saved at all.
    - rank: factors are no whole tiles, those of the automatic multiple.
    - order: to bring outputs into their order takes longer than what is saved.
    - noise: the difference is within the spread of the times.

    Args:
        calls: Seconds by which a call of the form takes longer than one of a dense linear, where
            both have next to no values.
    """
    if measured.speed >= 1:
        return []
    if measured.form in REBUILT:
        return ["form: its dense weight is made at every call; export it as dense to serve it"]
    dense, least = measured.bounds(limits)
    saved, pivoted = dense - least, measured.form == "pivoted"
    found = []
    if calls > saved:
        found.append(
            f"launch-bound: calls that it adds take {1e6 * calls:.1f} us, and the smaller weight "
            f"saves {max(1e6 * saved, 0):.1f} us"
        )
    if measured.kept > 0.9:
        most = 1 - measured.kept
        found.append(f"too small: at most {most:.1%} of the time is saved, as of the values")
    sizes = {"rank": measured.rank}
    if pivoted:
        sizes["outputs less rank"] = measured.out_features - measured.rank
    tile = automatic_multiple(min(measured.out_features, measured.in_features))
    odd = [f"{name} {size}" for name, size in sizes.items() if size % tile]
    if odd:
        found.append(f"rank: {' and '.join(odd)}, no multiple of {tile} (--rank-multiple auto)")
    copied = limits.copied(measured.tokens * measured.out_features) if pivoted else 0.0
    if not found and copied > saved:
        found.append(
            f"order: outputs are copied into their order in {1e6 * copied:.0f} us, and the smaller "
            f"weight saves {1e6 * saved:.0f} us"
        )
    if 1 - measured.speed <= measured.spread:
        found.append(f"noise: times differ by {measured.spread:.0%} from round to round")
    return found or ["not explained by rates, calls, rank or form"]
