"""A budget in bytes: the plan of the most values whose bytes, indices included, still fit."""

from collections.abc import Callable, Sequence
from fractions import Fraction

from orchestrator.errors import InfeasibleError
from orchestrator.plan import Linear, Plan

STEPS = 10**7
"""The kept fraction is found to one part in so many."""


def fill_bytes(
    allocate: Callable[[float], Plan], linears: Sequence[Linear], share: float, itemsize: int
) -> Plan:
    """The plan of the largest kept fraction that stores at most `share` of the dense bytes.

    Values never take a larger share than bytes do, so the search is over (0, share], by bisection;
    it relies on stored bytes that do not fall with the kept fraction.

    Args:
        allocate: The plan of a kept fraction of values.
        itemsize: Bytes of a value, dense or not.

    Raises:
        InfeasibleError: No plan is that small.
    """
    dense_bytes = sum(linear.values for linear in linears) * itemsize
    most = Fraction(str(share)) * dense_bytes
    found: Plan | None = None
    low, high = 0, int(Fraction(str(share)) * STEPS)
    step = high
    while low < high:
        try:
            plan = allocate(step / STEPS)
            stored = sum(plan.assignments[x.name].stored_bytes(x, itemsize) for x in linears)
            fits = stored <= most
        except InfeasibleError:
            # too little for a rank everywhere
            low = step
        else:
            if fits:
                low, found = step, plan
            else:
                high = step - 1
        step = low + (high - low + 1) // 2
    if found is None:
        raise InfeasibleError(
            f"keep_bytes: {share} of {dense_bytes} bytes holds no plan, indices included; keep more"
        )
    return found
