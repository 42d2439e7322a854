"""Whether what an earlier run has committed is still what it was.

Sizes are compared wherever a unit is looked up; content is read here, once, when a run is taken
up again, and by the workers: they read those files later anyway, and hash as many at a time as
there are workers, while the driver would read the whole result alone. It costs one reading of the
files, seconds where making them again takes hours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.runtime.calls import Call, IndependentCalls, Verify
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.store.places import Place


def verified_units(
    workers: WorkerGroup, monitor: RunMonitor, hashes: Mapping[str, Sequence[tuple[Place, str]]]
) -> frozenset[str]:
    """The names of those whose files all have their hashes; the others are named aloud.

    Args:
        hashes: For each name its files, each with its BLAKE2b.
    """
    if not hashes:
        return frozenset()
    found: dict[str, bool] = {}
    with monitor.stage("verify") as stage:

        def on_success(call: Call, value: Any) -> None:
            found[call.label] = value
            stage.progress(len(found), len(hashes), unit=call.label)

        bag = IndependentCalls([(name, Verify(files)) for name, files in hashes.items()])
        dispatch(workers.pool, bag, FailurePolicy(), on_success=on_success, on_event=monitor.event)
    for name in hashes:
        if not found[name]:
            monitor.event({"event": "damaged", "unit": name, "why": "its files have other hashes"})
    return frozenset(name for name in hashes if found[name])
