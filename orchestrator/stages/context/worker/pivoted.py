"""Pivoted factors of linears: made from their factors, committed, and read for the checkpoint.

Shape suffixes: O outputs, I inputs, R rank, S = O - R.
"""

import time
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from orchestrator.device.transport import CPU, download
from orchestrator.linalg.pivot import pivot
from orchestrator.methods.kinds.base import Factor
from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.stored import StoredFile
from orchestrator.store.run import RunDirectory

PIVOTED_FILE = "pivoted.safetensors"
PIVOTED_PARTS = ("others", "pivots", "order")


class FactorSource(Protocol):
    """Source of factors at any rank."""

    def factor(self, linear: Linear, part: Factor, rank: int) -> Tensor:
        """Return `weight` [O, R] or `down` [R, I], on the device."""
        ...


class PivotedFactors:
    """Source of the pivoted factors that `commit_pivoted` has stored."""

    def __init__(self, task: CompressionTask, run: RunDirectory) -> None:
        self._task, self._run = task, run

    def read(self, tensor: TensorSpec) -> Tensor | None:
        if tensor.part not in PIVOTED_PARTS:
            return None
        key = self._task.pivoted_key(self._task.linear(tensor.source), tensor.rank)
        return StoredFile(self._run.units.file(key, PIVOTED_FILE), CPU).whole(tensor.part)


def commit_pivoted(
    worker: Worker, task: CompressionTask, factors: FactorSource, size: tuple[str, int]
) -> dict[str, Any]:
    """Convert a linear's factors to pivoted storage and commit them.

    Args:
        size: Name and rank of the linear.

    Returns the unit's facts: measurements, see `Pivoted`, and seconds.
    """
    start = time.monotonic()
    name, rank = size
    linear = task.linear(name)
    result = pivot(factors.factor(linear, "weight", rank), factors.factor(linear, "down", rank))
    parts = result.weight_SR, result.down_RI, result.order_O
    unit = worker.run.units.begin(task.pivoted_key(linear, rank))
    with unit.file(PIVOTED_FILE) as path:
        stored = (download(each.contiguous()) for each in parts)
        save_file(dict(zip(PIVOTED_PARTS, stored, strict=True)), path)
    facts = {"numerics": result.report, "timings": {"seconds": time.monotonic() - start}}
    unit.commit(environment=worker.environment(), facts=facts)
    return facts
