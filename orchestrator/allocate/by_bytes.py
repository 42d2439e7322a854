"""Budget in bytes: the largest plan whose bytes, including indices, are within the budget."""

from collections.abc import Callable, Sequence
from fractions import Fraction

from orchestrator.errors import InfeasibleError
from orchestrator.plan.codecs import Codec
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan

STEPS = 10**7
"""Resolution of the kept fraction: it is found to one part in `STEPS`."""


def fill_bytes(
    allocate: Callable[[float], Plan], linears: Sequence[Linear], share: float, codec: Codec
) -> Plan:
    """Find the plan of the largest kept fraction that stores at most `share` of the dense bytes.

    The fraction of values is never above the fraction of bytes, so the bisection is over (0,
    share]. It assumes that stored bytes do not fall as the kept fraction grows.

    Args:
        allocate: Returns the plan for a kept fraction of values.
        codec: Number format of the values, dense or compressed.

    Raises:
        InfeasibleError: No plan is small enough, or `share` itself is infeasible as a budget.
    """
    dense_bytes = codec.bytes(sum(linear.values for linear in linears))
    most = Fraction(str(share)) * dense_bytes

    def fits(plan: Plan) -> bool:
        stored = sum(plan.assignments[each.name].stored_bytes(each, codec) for each in linears)
        return stored <= most

    # forms without indices end here, as do errors that a smaller fraction cannot fix
    largest = allocate(share)
    if fits(largest):
        return largest
    found: Plan | None = None
    low, high = 0, int(Fraction(str(share)) * STEPS)
    while low < high:
        step = low + (high - low + 1) // 2
        try:
            plan = allocate(step / STEPS)
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
            f"keep_bytes: {share} of {dense_bytes} bytes is too small for any plan, indices "
            "included; keep more"
        )
    return found
