"""A pass of chunks through the shards, performed: calls dispatched, spent chunks let go."""

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.runtime.calls import Call
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.store.chunks import Chunks

WINDOW = 4
"""Chunks that wait in memory between two workers; what is further ahead waits in files."""


def run_pass(
    workers: WorkerGroup,
    monitor: RunMonitor,
    schedule: ShardPass,
    chunks: Chunks,
    on_success: Callable[[Call, Any], None],
    patience: Mapping[str, float] = {},
    beside: Chunks | None = None,
) -> None:
    """Performs a pass to its end; only the boundary chunks that it keeps stay.

    A pass that breaks off (see `ShardPass`) leaves all of them for the one that goes on.

    Args:
        chunks: Where the pass keeps its boundary chunks.
        beside: Chunks of the other pass that it reads; dropped as they are spent.
        on_success: Told of each call that ended well, with its small result.
        patience: By method, seconds that a call may take.

    Raises:
        OrchestratorError: As `dispatch`.
    """

    def succeeded(call: Call, value: Any) -> None:
        on_success(call, value)
        for boundary in schedule.drop_inputs():
            chunks.drop(boundary)
        for boundary in schedule.drop_beside():
            assert beside is not None
            beside.drop(boundary)

    dispatch(
        workers.pool,
        schedule,
        FailurePolicy(),
        on_success=succeeded,
        is_awaited=lambda chunk: schedule.is_awaited(chunk, WINDOW),
        on_event=monitor.event,
        patience=patience,
    )
    if not schedule.keeps and not schedule.broken_off:
        chunks.clear()
