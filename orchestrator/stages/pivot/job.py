"""Bringing cut factors to pivoted storage, once there is a plan: the driver's part."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.forecast.work import pivoting
from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.deadline import slowly
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.worker import Worker
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.refine.job import Refine
from orchestrator.store.files import digest_json

if TYPE_CHECKING:
    from orchestrator.stages.context.compression import Compression


class Pivot:
    """A unit for each linear that is stored pivoted; whatever follows reads it there.

    It stands before training, which trains what is stored, and behind a fit of left factors.

    Args:
        superseding: The later stage that spends its units, if there is one (see `Refine`).
    """

    name: ClassVar[str] = "pivot"
    timings: ClassVar[Mapping[str, float]] = {}

    def __init__(
        self,
        job: "Compression",
        worker_class: type[Worker],
        task: CompressionTask,
        superseding: Refine | None = None,
    ) -> None:
        self._job, self._superseding = job, superseding
        self.worker_class, self.task = worker_class, task
        plan = job.plan.assignments
        self._sizes = {
            each: plan[each.name].rank for each in job.linears if plan[each.name].form == "pivoted"
        }
        self._keys = {
            linear.name: task.pivoted_key(linear, rank) for linear, rank in self._sizes.items()
        }
        self.key = digest_json(self._keys)
        """The name of all units together."""

    def perform(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Every linear a call, on whoever is idle."""
        units = self._job.run.units
        self._facts = self._taken_up(workers, monitor, stage)
        missing = {each: rank for each, rank in self._sizes.items() if each.name not in self._facts}

        def on_success(call: Call, value: Any) -> None:
            name = call.arguments[0]
            self._facts[name] = value
            size = units.size(self._keys[name])
            stage.progress(len(self._facts), len(self._keys), unit=name, bytes=size)

        flops = max((pivoting(*each).flops for each in missing.items()), default=0.0)
        calls = [(each.name, (each.name, rank)) for each, rank in missing.items()]
        dispatch(
            workers.pool,
            IndependentCalls("pivot", calls),
            FailurePolicy(),
            on_success=on_success,
            on_event=monitor.event,
            patience={"pivot": slowly(flops, workers.environment["device"])},
        )

    def _taken_up(
        self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor
    ) -> dict[str, Any]:
        """Facts of the units to reuse; a spent one counts if the later stage has its block."""
        units = self._job.run.units
        found = {name: units.manifest(key) for name, key in self._keys.items()}
        spent = [each for each in self._sizes if (m := found[each.name]) and m["spent"]]
        if spent:
            later = self._superseding.reusable_units(workers, monitor) if self._superseding else {}
            for linear in spent:
                if linear.block not in later:
                    units.drop(self._keys[linear.name])
        return reusable_units(units, self._keys, workers, monitor, stage.name)

    def spend(self, block: int) -> None:
        """Removes the pivoted factors of a block; only their measurements stay."""
        for linear in self._sizes:
            if linear.block == block:
                self._job.run.units.spend(self._keys[linear.name])

    @property
    def measured(self) -> Mapping[str, Any]:
        """What was measured of each linear, see `linalg.pivot.Pivoted`."""
        return {name: facts["numerics"] for name, facts in self._facts.items()}

    @property
    def report(self) -> Mapping[str, Any]:
        """The most of each figure over all linears; theirs stand with their numerics."""
        figures = self.measured.values()
        names: Mapping[str, Any] = next(iter(figures), {})
        return {"linears": len(figures), **{n: max(each[n] for each in figures) for n in names}}
