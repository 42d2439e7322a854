"""Cost of pivoted storage."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from orchestrator.forecast.memory import PROCESS_BYTES, Footprint
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Parts, StageCost
from orchestrator.forecast.work import Work
from orchestrator.plan.forms import PIVOTED
from orchestrator.plan.linear import Linear

BAND = 256
"""Rows at a time in which a pivoted product is compared (`linalg.pivot`, which imports torch)."""


class PivotCost(StageCost):
    """One unit for every linear; the last may keep one worker longer than the others."""

    is_float64: ClassVar[bool] = True

    def calls(self) -> Sequence[Work]:
        """By linear: factors are read, pivoted and written."""
        return [self._pivot(each) for each in self.setting.shapes.linears]

    def shares(self) -> Mapping[str, Work]:
        """A FLOP, of which a call counts as many again (`PivotJob.perform`)."""
        return {"pivot": Work(double=0.5)}

    def _pivot(self, linear: Linear) -> Work:
        itemsize = self.setting.costs.out_itemsize
        rank = PIVOTED.rank_within(linear, int(self.setting.kept * linear.values))
        read = float(rank * linear.rank_cost * itemsize)
        written = float(PIVOTED.factor_values(linear, rank) * itemsize)
        return Work(double=pivot_flops(linear, rank), read=read, write=written)

    def forecast(self, held: Footprint) -> StageForecast:
        setting, pivots = self.setting, self.calls()

        def take(rates: Rates) -> float:
            seconds = [each.seconds(rates) for each in pivots]
            return max(sum(seconds) / setting.workers, max(seconds, default=0.0))

        return StageForecast(
            name="pivot",
            flops=sum(each.flops for each in pivots),
            seconds=setting.seconds(take),
            device=pivoting(setting.shapes, setting.kept, setting.costs.out_itemsize),
        )

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        factors = self.setting.costs.out_itemsize * self.setting.kept_values
        after = {**before, "pivoted factors": factors}
        return after, after

    def remedy(self) -> str:
        return "--storage plain leaves it out"


def pivoting(shapes: Shapes, kept: float, itemsize: int) -> Footprint:
    """Footprint of the linear whose pivoting takes the most memory."""
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "pivoting": max(
                (_pivoting(each, kept, itemsize) for each in shapes.linears), default=0
            ),
        }
    )


def _pivoting(linear: Linear, kept: float, itemsize: int) -> int:
    """Bytes of the stored factors, and of an orthonormal basis or of the comparison."""
    outputs, inputs = linear.out_features, linear.in_features
    rank = PIVOTED.rank_within(linear, int(kept * linear.values))
    choosing = 5 * outputs * rank
    comparing = 3 * rank * inputs + outputs * rank + 6 * BAND * inputs
    return 2 * itemsize * rank * linear.rank_cost + 8 * max(choosing, comparing)


def pivot_flops(linear: Linear, rank: float) -> float:
    """FLOPs that bring one linear's factors of a rank to pivoted storage.

    By the formulas of `linalg.pivot`; exchanges after the elimination, each a pass over the
    coefficients, are not counted.
    """
    outputs, inputs = float(linear.out_features), float(linear.in_features)
    others = outputs - rank
    basis = 4 * outputs * rank**2 - 4 / 3 * rank**3
    eliminated = outputs * rank**2 - rank**3 / 3
    solved = 2 * (2 / 3 * rank**3 + 2 * others * rank**2)
    rows = 2 * rank**2 * inputs
    checked = 2 * (outputs + others) * rank * inputs
    return basis + eliminated + solved + rows + checked
