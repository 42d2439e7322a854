"""Verification of the units that an earlier run has committed.

Sizes are compared at each look-up of a unit; contents are hashed here, once, when a run is resumed.
The workers do it, because they read these files later anyway, and hash in parallel, while the
driver alone would read the whole result. The cost is one read of the files: seconds, where making
the units again takes hours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.runtime.calls import Call, IndependentCalls, Verify
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stage_names import VERIFY
from orchestrator.store.places import Place


def verified_units(
    workers: WorkerGroup, monitor: RunMonitor, hashes: Mapping[str, Sequence[tuple[Place, str]]]
) -> frozenset[str]:
    """Names of the units whose files all have their hashes; each other one is an event.

    Args:
        hashes: For each name its files, each with its BLAKE2b.
    """
    if not hashes:
        return frozenset()
    found: dict[str, bool] = {}
    with monitor.stage(VERIFY) as stage:

        def on_success(call: Call, value: Any) -> None:
            found[call.label] = value
            where = workers.location(call.worker)
            stage.progress(len(found), len(hashes), unit=call.label, **where)

        units = IndependentCalls([(name, Verify(files)) for name, files in hashes.items()])
        dispatch(
            workers.pool,
            units,
            FailurePolicy(),
            on_success=on_success,
            on_event=monitor.event,
            tally=monitor.tally(),
        )
    for name in hashes:
        if not found[name]:
            monitor.event({"event": "damaged", "unit": name, "why": "its files have other hashes"})
    return frozenset(name for name in hashes if found[name])
