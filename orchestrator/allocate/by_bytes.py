"""Plan of a budget in values, or the largest whose bytes, including indices, are within it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from orchestrator.allocate.budget import Budget
from orchestrator.errors import InfeasibleError
from orchestrator.plan.codecs import Codec
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan

STEPS = 10**7
"""Resolution of the kept fraction: it is found to one part in `STEPS`."""


def fill_budget(
    divide: Callable[[Budget], Plan], linears: Sequence[Linear], budget: Budget, codec: Codec
) -> Plan:
    """Return the plan of a budget; of one in bytes, the plan of the largest kept fraction within.

    The fraction of values is never above the fraction of bytes, so the bisection is over (0,
    kept]. It assumes that stored bytes do not fall as the kept fraction grows.

    Args:
        divide: Returns the plan of a budget in values.
        codec: Number format of the values, dense or compressed.

    Raises:
        InfeasibleError: No plan is small enough, or the budget is infeasible in values.
    """
    dense_bytes = codec.bytes(sum(linear.values for linear in linears))
    most = Fraction(str(budget.kept)) * dense_bytes

    def fits(plan: Plan) -> bool:
        stored = sum(plan.assignments[each.name].stored_bytes(each, codec) for each in linears)
        return stored <= most

    # forms without indices end here, as do errors that a smaller fraction cannot fix
    largest = divide(budget)
    if not budget.in_bytes or fits(largest):
        return largest
    found: Plan | None = None
    low, high = 0, int(Fraction(str(budget.kept)) * STEPS)
    while low < high:
        step = low + (high - low + 1) // 2
        try:
            plan = divide(replace(budget, kept=step / STEPS))
        except InfeasibleError:
            # too small for one rank or entry per linear
            low = step
            continue
        if fits(plan):
            low, found = step, plan
        else:
            high = step - 1
    if found is None:
        raise InfeasibleError(
            f"keep_bytes: {budget.kept} of {dense_bytes} bytes is too small for any plan, indices "
            "included; keep more"
        )
    return found
