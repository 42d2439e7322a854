"""Pivoted storage of cut factors: the driver's part."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.deadline import slowly
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.commands import PivotLinear
from orchestrator.stages.context.decompose import compression_task
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.values import Planned
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.pivot.cost import pivot_flops
from orchestrator.store.files import digest_json


class PivotJob(StageJob):
    """A unit for each linear that is stored pivoted; every later stage reads it there.

    It comes after a refit of left factors and before training, which trains what is stored.
    """

    name = "pivot"

    def __init__(self, planned: Planned, earlier: Sequence[StageJob]) -> None:
        self._units = planned.run.units
        self.worker_class: type[Worker] = CompressionWorker
        self._task = compression_task(planned)
        if earlier:
            # its workers know where the fitted factors are stored
            self.worker_class, self._task = earlier[-1].worker_class, earlier[-1].task
        plan = planned.plan.assignments
        self._sizes = {
            each: plan[each.name].rank
            for each in planned.linears
            if plan[each.name].form == "pivoted"
        }
        self._keys = {
            linear.name: self._task.pivoted_key(linear, rank)
            for linear, rank in self._sizes.items()
        }
        self.key = digest_json(self._keys)

    @property
    def task(self) -> CompressionTask:
        return self._task

    def perform(self, stage: RunningStage, following: StageJob | None = None) -> StageResult:
        """Pivot every linear in a call of its own, on any idle worker."""
        done = self._reusable(stage, following)
        missing = {each: rank for each, rank in self._sizes.items() if each.name not in done}

        def on_success(call: Call, value: Any) -> None:
            name = call.label
            done[name] = value
            about = {"bytes": self._units.size(self._keys[name])}
            about |= stage.workers.location(call.worker)
            stage.progress(len(done), len(self._keys), unit=name, **about)

        flops = {each.name: pivot_flops(each, rank) for each, rank in missing.items()}
        # about half of a call is reading, writing and what does not grow with its size
        mean = sum(flops.values()) / max(len(flops), 1)
        work = {name: each + mean for name, each in flops.items()}
        calls = [(each.name, PivotLinear(each.name, rank)) for each, rank in missing.items()]
        dispatch(
            stage.workers.pool,
            IndependentCalls(calls, of="linears", work=work),
            FailurePolicy(),
            on_success=on_success,
            on_event=stage.monitor.event,
            tally=stage.monitor.tally(),
            patience={
                "pivot": slowly(
                    max(flops.values(), default=0.0), stage.workers.environment["device"]
                )
            },
        )
        return self._result(done)

    def _reusable(self, stage: RunningStage, following: StageJob | None) -> dict[str, Any]:
        """Facts of the units to reuse; a spent one counts if `following` has its block."""
        found = {name: self._units.manifest(key) for name, key in self._keys.items()}
        spent = [each for each in self._sizes if (m := found[each.name]) and m["spent"]]
        if spent:
            later: Mapping[int, Any] = {}
            if following is not None and following.supersedes:
                later = following.reusable_blocks(stage)
            for linear in spent:
                if linear.block not in later:
                    self._units.drop(self._keys[linear.name])
        return reusable_units(
            self._units, self._keys, stage.workers, stage.monitor, stage=stage.name
        )

    def spend(self, block: int) -> None:
        """Remove the pivoted factors of a block; only their measurements stay."""
        for linear in self._sizes:
            if linear.block == block:
                self._units.spend(self._keys[linear.name])

    def _result(self, facts: dict[str, Any]) -> StageResult:
        """Measurements of each linear (see `linalg.pivot.Pivoted`), and the largest of each."""
        measured = {name: each["numerics"] for name, each in facts.items()}
        figures = list(measured.values())
        names = figures[0] if figures else {}
        largest = {name: max(each[name] for each in figures) for name in names}
        return StageResult(
            name=self.name,
            key=self.key,
            report={"linears": len(figures), **largest},
            numerics=measured,
        )
