"""The driver's half: a call for each block, on any idle worker."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.runtime.calls import Command, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.stages.context.decompose import compression_task
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.trained_units import changed_blocks, trained_units
from toy.rescale.worker import RescaleSettings, RescaleWorker


@dataclass(frozen=True, slots=True)
class RescaleBlock(Command):
    """Scale the cut linears of a block."""

    method: ClassVar[str] = "rescale"

    block: int


class RescaleJob(StageJob):
    """A unit of scaled diagonals for each block with a cut linear."""

    name = "rescale"
    worker_class = RescaleWorker

    def __init__(self, planned, earlier, largest):
        blocks = changed_blocks(planned)
        units = trained_units(
            planned, earlier, name=self.name, version=1, blocks=blocks, largest=largest
        )
        self.key, self.trained_units = units.key, units.keys
        self._planned, self._settings = planned, RescaleSettings(units=units, largest=largest)

    @property
    def task(self):
        return compression_task(self._planned, pass_key=self.key, settings=self._settings)

    def perform(self, stage, following=None):
        units, keys = self._planned.run.units, self.trained_units
        done = reusable_units(units, keys, stage.workers, stage.monitor, stage=self.name)
        missing = [block for block in keys if block not in done]

        def on_success(call, value):
            done[call.command.block] = value
            stage.progress(len(done), len(keys), unit=call.label)

        calls = [(f"block {block}", RescaleBlock(block)) for block in missing]
        dispatch(
            stage.workers.pool,
            IndependentCalls(calls),
            FailurePolicy(),
            on_success=on_success,
            on_event=stage.monitor.event,
        )
        factors = {name: each for facts in done.values() for name, each in facts["factors"].items()}
        return StageResult(
            name=self.name, key=self.key, report={"factors": dict(sorted(factors.items()))}
        )
