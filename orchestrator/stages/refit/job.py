"""Refit of left factors: the driver's part."""

from dataclasses import replace

from orchestrator.plan.forms import FORMS
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.decompose import block_pass, compression_task
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.values import Planned
from orchestrator.stages.refit.worker import RefitSettings, RefitWorker
from orchestrator.store.units import unit_key

REFIT_VERSION = 1
"""Raised when a fit changes."""


class RefitJob(StageJob):
    """One pass through the cut blocks, and a unit of left factors for each of them."""

    name = "refit"
    worker_class: type[Worker] = RefitWorker

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        inputs = [planned.pass_key, *planned.block_keys.values(), *planned.chosen_by]
        plan = planned.plan.to_json()
        self.key = unit_key("calibrate cut", REFIT_VERSION, inputs, plan=plan)
        forms = {name: FORMS[each.form] for name, each in planned.plan.assignments.items()}
        is_fitted = {
            name: form.is_factored and not form.shares_left for name, form in forms.items()
        }
        blocks = sorted({each.block for each in planned.linears if is_fitted[each.name]})
        self._keys = {
            block: unit_key("refit", REFIT_VERSION, [self.key], block=block) for block in blocks
        }

    @property
    def task(self) -> CompressionTask:
        settings = RefitSettings(plan=self._planned.plan)
        task = compression_task(self._planned, pass_key=self.key, settings=settings)
        return replace(task, refit_keys=self._keys)

    def perform(self, stage: RunningStage, following: StageJob | None = None) -> StageResult:
        """Pass chunks through the cut blocks, and fit left factors to the inputs found there."""
        passes = block_pass(self._planned, self._planned.forecast)
        facts = passes.forward(self.key, self._keys, stage)
        return StageResult(
            name=self.name,
            key=self.key,
            report="errors of linears are those before left factors were fitted again",
            # units of earlier versions have no reports of their fits
            numerics={
                name: said
                for each in facts.values()
                for name, said in each.get("numerics", {}).items()
            },
        )
