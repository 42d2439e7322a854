"""Plans within a budget: of values; of bytes, indices included; or of another cost.

An allocator that divides values alone has one knob, the kept fraction: the plan of the largest one
is taken that is within the bytes or the cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from orchestrator.allocate.budget import Budget, plan_cost, too_small
from orchestrator.errors import InfeasibleError
from orchestrator.plan.codecs import Codec
from orchestrator.plan.cost import VALUES
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan

STEPS = 10**7
"""Resolution of the kept fraction: it is found to one part in `STEPS`."""


def fill_budget(
    divide: Callable[[Budget], Plan],
    linears: Sequence[Linear],
    budget: Budget,
    codec: Codec,
    *,
    divides_costs: bool = False,
) -> Plan:
    """Return the plan of a budget; of one in bytes, the plan of the largest kept fraction within.

    Of another cost it is that of `divide` itself, or that of the largest kept fraction of values
    within the cost.

    The fraction of values is never above the fraction of bytes, so that bisection is over (0,
    kept]. It assumes that stored bytes do not fall as the kept fraction grows.

    Args:
        divide: Returns the plan of a budget in values.
        codec: Number format of the values, dense or compressed.
        divides_costs: True if `divide` takes a budget of any cost.

    Raises:
        InfeasibleError: No plan is small enough, or the budget is infeasible in values.
    """
    if budget.cost is not VALUES:
        return divide(budget) if divides_costs else _fill_cost(divide, linears, budget)
    dense_bytes = codec.bytes(sum(linear.values for linear in linears))
    most = Fraction(str(budget.kept)) * dense_bytes

    def fits(plan: Plan) -> bool:
        stored = sum(plan.assignments[each.name].stored_bytes(each, codec) for each in linears)
        return stored <= most

    # forms without indices end here, as do errors that a smaller fraction cannot fix
    largest = divide(budget)
    if not budget.in_bytes or fits(largest):
        return largest
    found = _largest(lambda kept: divide(replace(budget, kept=kept)), fits, budget.kept)
    if found is None:
        raise InfeasibleError(
            f"keep_bytes: {budget.kept} of {dense_bytes} bytes is too small for any plan, indices "
            "included; keep more"
        )
    return found


def _fill_cost(divide: Callable[[Budget], Plan], linears: Sequence[Linear], budget: Budget) -> Plan:
    """Return the plan of the largest kept fraction of values whose cost is within the budget.

    A linear whose factors would cost no less than its dense weight is left dense. It is assumed
    that the cost does not fall as the kept fraction grows.

    Raises:
        InfeasibleError: Every plan costs more.
    """
    cost, total, least = budget.cost, budget.share(linears), list[int]()

    def at(kept: float) -> Plan:
        return _without_loss_of_speed(divide(budget.in_values(kept)), linears, budget)

    def fits(plan: Plan) -> bool:
        least.append(plan_cost(linears, plan.assignments, cost))
        return least[-1] <= total

    found = _largest(at, fits, 1.0)
    if found is None and not least:
        # the allocator's own reason, unless it allows this fraction alone
        plan = at(budget.kept)
        found = plan if fits(plan) else None
    if found is None:
        dense, what = sum(map(cost.dense, linears)), "the smallest plan of this allocation"
        raise too_small(budget, total, dense, least=min(least), what=what)
    return found


def _without_loss_of_speed(plan: Plan, linears: Sequence[Linear], budget: Budget) -> Plan:
    """Return the plan with linears dense whose factors cost no less; its values are its budget."""
    cost = budget.cost
    assignments = {
        each.name: Assignment(form="dense")
        if cost.of(each, plan.assignments[each.name]) >= cost.dense(each)
        else plan.assignments[each.name]
        for each in linears
    }
    stored = sum(assignments[each.name].stored_values(each) for each in linears)
    return replace(plan, assignments=assignments, budget_values=stored, stored_values=stored)


def _largest(
    plan_of: Callable[[float], Plan], fits: Callable[[Plan], bool], most: float
) -> Plan | None:
    """Return the plan of the largest kept fraction up to `most` that fits, or None.

    Fractions without a plan are too small for one, or above those that an allocator allows.
    """
    found: Plan | None = None
    low, high = 0, int(Fraction(str(most)) * STEPS)
    while low < high:
        step = low + (high - low + 1) // 2
        try:
            plan = plan_of(step / STEPS)
        except InfeasibleError:
            if found is None:
                low = step
            else:
                high = step - 1
            continue
        if fits(plan):
            low, found = step, plan
        else:
            high = step - 1
    return found
