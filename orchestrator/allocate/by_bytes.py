"""A budget in bytes: the plan of the most values whose bytes, indices included, still fit."""

from collections.abc import Callable, Sequence
from fractions import Fraction

from orchestrator.errors import InfeasibleError
from orchestrator.plan.codecs import Codec
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan

STEPS = 10**7
"""The kept fraction is found to one part in so many."""


def fill_bytes(
    allocate: Callable[[float], Plan], linears: Sequence[Linear], share: float, codec: Codec
) -> Plan:
    """The plan of the largest kept fraction that stores at most `share` of the dense bytes.

    Values never take a larger share than bytes do, so the search is over (0, share], by bisection;
    it relies on stored bytes that do not fall with the kept fraction.

    Args:
        allocate: The plan of a kept fraction of values.
        codec: Number format of the values, dense or not.

    Raises:
        InfeasibleError: No plan is that small, or none has a budget of `share` at all.
    """
    dense_bytes = codec.bytes(sum(linear.values for linear in linears))
    most = Fraction(str(share)) * dense_bytes

    def fits(plan: Plan) -> bool:
        stored = sum(plan.assignments[each.name].stored_bytes(each, codec) for each in linears)
        return stored <= most

    # what stores no index ends here, and so does what no smaller share can mend
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
            # too little for a rank or an entry everywhere
            low = step
            continue
        if fits(plan):
            low, found = step, plan
        else:
            high = step - 1
    if found is None:
        raise InfeasibleError(
            f"keep_bytes: {share} of {dense_bytes} bytes holds no plan, indices included; keep more"
        )
    return found
