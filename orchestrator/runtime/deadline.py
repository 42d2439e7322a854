"""Deadlines after which a call is taken to hang: pure, without a clock."""

import os
from collections import defaultdict
from collections.abc import Mapping

from orchestrator.errors import UsageError

FLOOR_SECONDS = 1800.0
FACTOR = 10.0
SLOW_FLOPS = {"cpu": 2e9, "cuda": 2e11}
"""FLOP/s that decompositions reach at least, by kind of device."""
VARIABLE = "ORCHESTRATOR_DEADLINE_SECONDS"


class Deadlines:
    """Deadlines by method: ten times its longest successful call, but at least the floor.

    A call that is taken to hang costs its worker, and a slow call would be taken to hang on the
    next node again, which ends the run. The floor is therefore half an hour; the environment
    variable `ORCHESTRATOR_DEADLINE_SECONDS` of the driver sets another one, for slower machines or
    for an earlier decision.

    Args:
        patience: Seconds that a call of a method may take on slow devices, known before the first
            call; it raises the floor, unless the environment sets one.

    Raises:
        UsageError: The variable is not a number above 0.
    """

    def __init__(self, patience: Mapping[str, float] = {}) -> None:
        self._floor = floor_seconds()
        self._patience = {} if VARIABLE in os.environ else patience
        self._longest: defaultdict[str, float] = defaultdict(float)

    def note(self, method: str, seconds: float) -> None:
        """Record the duration of a successful call."""
        self._longest[method] = max(self._longest[method], seconds)

    def of(self, method: str) -> float:
        """Deadline of a call of this method, in seconds."""
        return max(self._floor, self._patience.get(method, 0.0), FACTOR * self._longest[method])


def slowly(flops: float, device: str) -> float:
    """Seconds that so many FLOPs may take on a device, given as in a worker's environment."""
    return flops / SLOW_FLOPS.get(device.partition(" ")[0], SLOW_FLOPS["cpu"])


def floor_seconds() -> float:
    """Floor of deadlines: the value of the environment variable, or the default."""
    said = os.environ.get(VARIABLE, str(FLOOR_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"{VARIABLE} is {said!r}; seconds above 0 are allowed")
    return seconds
