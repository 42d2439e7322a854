"""The driver's half: a call for each block, on any idle worker."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.runtime.calls import Command, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.stages.context.stage_job import StageResult
from orchestrator.stages.context.trained_stage import TrainedStage
from toy.rescale.worker import RescaleTask, RescaleWorker


@dataclass(frozen=True, slots=True)
class RescaleBlock(Command):
    """Scale the cut linears of a block."""

    method: ClassVar[str] = "rescale"

    block: int


class RescaleJob(TrainedStage):
    """A unit of scaled diagonals for each block with a cut linear."""

    name = "rescale"
    worker_class = RescaleWorker

    def __init__(self, planned, earlier, largest):
        self._largest = largest
        super().__init__(planned, earlier, version=1, largest=largest)

    @property
    def task(self):
        return RescaleTask(**self.shared, largest=self._largest)

    def perform(self, stage, following=None):
        units = self._planned.run.units
        done = reusable_units(units, self.keys, stage.workers, stage.monitor, stage=self.name)
        missing = [block for block in self.keys if block not in done]

        def on_success(call, value):
            done[call.command.block] = value
            stage.progress(len(done), len(self.keys), unit=call.label)

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
