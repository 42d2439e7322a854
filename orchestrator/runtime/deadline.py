"""When a call that does not answer is taken to hang: pure, without a clock."""

import os
from collections import defaultdict
from collections.abc import Mapping

from orchestrator.errors import UsageError

FLOOR_SECONDS = 1800.0
FACTOR = 10.0
SLOW_FLOPS = {"cpu": 2e9, "cuda": 2e11}
"""A second, by the kind of device: what decompositions surely reach."""
VARIABLE = "ORCHESTRATOR_DEADLINE_SECONDS"


class Deadlines:
    """Deadlines by method: ten times the longest call of it that ended well, or the floor if more.

    A call that is taken to hang costs its worker, and one that was only slow would be taken to
    again on the next node, which ends the run. So the floor is half an hour; the environment
    variable `ORCHESTRATOR_DEADLINE_SECONDS` of the driver sets another one, for machines that
    are slower still, or to be sure sooner.

    Args:
        patience: Seconds that a call of a method may take where all is slow, known before the
            first one; the floor is raised to it, unless the environment sets one.

    Raises:
        UsageError: The variable holds no number above 0.
    """

    def __init__(self, patience: Mapping[str, float] = {}) -> None:
        self._floor = floor_seconds()
        self._patience = {} if VARIABLE in os.environ else patience
        self._longest: defaultdict[str, float] = defaultdict(float)

    def note(self, method: str, seconds: float) -> None:
        """A call has ended well."""
        self._longest[method] = max(self._longest[method], seconds)

    def of(self, method: str) -> float:
        """Seconds after which a call of this method is taken to hang."""
        return max(self._floor, self._patience.get(method, 0.0), FACTOR * self._longest[method])


def slowly(flops: float, device: str) -> float:
    """Seconds that numerics may take on a slow device, named as a worker's environment does."""
    return flops / SLOW_FLOPS.get(device.partition(" ")[0], SLOW_FLOPS["cpu"])


def floor_seconds() -> float:
    """What the environment says, or the default."""
    said = os.environ.get(VARIABLE, str(FLOOR_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{VARIABLE} is {said!r}; seconds above 0 are allowed")
    return seconds
