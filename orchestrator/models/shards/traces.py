"""Latest traces of models in this process: a trace takes seconds, and is the same in every run."""

from collections.abc import Callable, Hashable

from orchestrator.models.survey.discovery import Discovery

KEPT_TRACES = 16
_traces: dict[Hashable, Discovery] = {}
"""By everything that they depend on; the oldest goes first."""


def trace_once(key: Hashable, trace: Callable[[], Discovery]) -> tuple[Discovery, bool]:
    """Trace the structure, unless this process has traced an equal one; True if it has not."""
    found = _traces.get(key)
    if found is not None:
        return found, False
    found = trace()
    while len(_traces) >= KEPT_TRACES:
        _traces.pop(next(iter(_traces)), None)
    _traces[key] = found
    return found, True
