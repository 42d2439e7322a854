"""Cost of pivoted storage."""

from orchestrator.forecast.memory import PROCESS_BYTES, Footprint
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Parts, StageCost
from orchestrator.plan.forms import PIVOTED
from orchestrator.plan.linear import Linear

BAND = 256
"""Rows at a time in which a pivoted product is compared (`linalg.pivot`, which imports torch)."""


class PivotCost(StageCost):
    """One unit for every linear; the last may keep one worker longer than the others."""

    def forecast(self, held: Footprint) -> StageForecast:
        setting, pivots = self.setting, self.setting.costs.pivots

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
