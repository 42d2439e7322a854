"""Fitting left factors again, once there is a plan: the driver's part."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.plan.forms import FACTORED
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.refit.worker import RefitTask, RefitWorker
from orchestrator.store.units import unit_key

if TYPE_CHECKING:
    from orchestrator.stages.context.compression import Compression

REFIT_VERSION = 1
"""Raised when a fit changes."""


class Refit:
    """One pass through the cut blocks, and a unit of left factors for each of them."""

    name: ClassVar[str] = "refit"
    worker_class: ClassVar[type[RefitWorker]] = RefitWorker
    timings: ClassVar[Mapping[str, float]] = {}
    report: ClassVar[str] = "errors of linears are those before left factors were fitted again"

    def __init__(self, job: "Compression") -> None:
        self._job = job
        inputs = [job.pass_key, *job.block_keys.values()]
        plan = job.plan.to_json()
        self.key = unit_key("calibrate cut", REFIT_VERSION, inputs, plan=plan)
        """The name of what the pass gives: it decides the bytes of files that hold factors."""

    @property
    def task(self) -> RefitTask:
        """What the workers need to know."""
        job = self._job
        forms = {name: assignment.form for name, assignment in job.plan.assignments.items()}
        blocks = sorted({each.block for each in job.linears if forms[each.name] in FACTORED})
        return RefitTask(
            **{field.name: getattr(job.task, field.name) for field in fields(CompressionTask)}
            | {"pass_key": self.key},
            plan=job.plan,
            refit_keys={
                block: unit_key("refit", REFIT_VERSION, [self.key], block=block) for block in blocks
            },
        )

    def perform(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Chunks flow through the cut blocks; left factors are fitted to the inputs found there."""
        keys = self.task.refit_keys
        self._facts = self._job.block_pass.forward(self.key, keys, workers, monitor, stage)

    @property
    def measured(self) -> Mapping[str, Any]:
        """Reports of the fits that have one, by linear."""
        facts = self._facts.values()
        # units of earlier versions have none
        return {name: said for each in facts for name, said in each.get("numerics", {}).items()}
