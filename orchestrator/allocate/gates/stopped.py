"""Base of allocators whose gates close until a kept fraction, the smallest size of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.allocate.gates.scores import extrapolates, open_cost, plan_of_scores
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.cost import VALUES
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.recipe.options import check_choice, check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedGates(GateAllocator):
    """Base of `learned` and `path`: a size takes the directions whose gates close last."""

    stop: float = 0.4
    """Kept fraction of values at which the steps end: the smallest size of the run."""
    below_stop: Literal["refuse", "allow"] = "refuse"
    """Sizes below the smallest one: refused, or by the scores of the gates open at the end."""

    def __post_init__(self) -> None:
        # slots=True makes the class anew, which super() does not see
        GateAllocator.__post_init__(self)
        check_number(f"{self.name}: stop", self.stop, 1e-3, 1)
        check_choice(f"{self.name}: below_stop", self.below_stop, ("refuse", "allow"))

    def decisive(self) -> dict[str, Any]:
        """Options that decide the scores."""
        options = asdict(self)
        del options["below_stop"]
        return options

    def ends_at(self, kept: float) -> bool:
        """Test if a kept fraction of open gates is small enough."""
        return kept <= self.stop

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `Budget.total`, and UsageError for a size below `stop`."""
        budget.total(linears)
        if self.below_stop == "refuse" and budget.cost is VALUES and budget.kept < self.stop:
            raise UsageError(
                f"keep: {budget.kept} is below {self.stop}, where {self.name}.stop ends the "
                f"learning; keep more, give a lower {self.name}.stop, or "
                f"{self.name}.below_stop=allow"
            )

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan that keeps the directions whose gates close last.

        Raises:
            InfeasibleError: As `Budget.total`; or the budget does not hold all open gates, and
                `below_stop` refuses.
            InputError: Scores of a linear are missing.
        """
        plan = plan_of_scores(linears, curves, budget)
        if self.below_stop == "refuse" and extrapolates(linears, curves, plan, budget.ranks):
            least = sum(open_cost(each, curves[each.name], budget.ranks) for each in linears)
            dense = sum(map(budget.cost.dense, linears))
            raise InfeasibleError(
                f"{budget.cost.field}: {budget.kept} closes gates that learning left open, and "
                f"their order is not learned; the smallest learned size is {least / dense:.6f}: "
                f"keep more, learn further ({self.name}.stop, or more steps), or give "
                f"{self.name}.below_stop=allow"
            )
        return plan
