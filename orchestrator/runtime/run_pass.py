"""Execution of a pass of chunks through shards; chunks that are not read again are released."""

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.progress.tally import Ahead
from orchestrator.runtime.calls import Call
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.store.chunks import Chunks

WINDOW = 4
"""Chunks that wait in memory between two workers; later ones wait in files."""


def run_pass(
    workers: WorkerGroup,
    monitor: RunMonitor,
    schedule: ShardPass,
    chunks: Chunks,
    *,
    on_success: Callable[[Call, Any], None] = lambda call, value: None,
    patience: Mapping[str, float] = {},
    beside: Chunks | None = None,
    ahead: Ahead | None = None,
) -> None:
    """Execute a pass to its end; only boundary chunks that it keeps stay.

    A pass that breaks off (see `ShardPass`) leaves all of its chunks for the pass that continues.

    Args:
        chunks: Store of the pass's boundary chunks.
        beside: Chunks of the other pass that it reads; dropped when they are not read again.
        on_success: Called with each successful call and its result.
        patience: By method, seconds that a call may take.
        ahead: Work of the stage after this pass.

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
        tally=monitor.tally(ahead),
    )
    if not schedule.keeps and not schedule.broken_off:
        chunks.clear()
