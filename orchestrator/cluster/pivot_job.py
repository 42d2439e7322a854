"""Bringing cut factors to pivoted storage, once there is a plan: the driver's part."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.cluster.compress_worker import CompressionTask, CompressionWorker
from orchestrator.cluster.crew import Crew
from orchestrator.cluster.deadline import slowly
from orchestrator.cluster.dispatch import dispatch
from orchestrator.cluster.policy import FailurePolicy
from orchestrator.cluster.schedule import Bag, Call
from orchestrator.cluster.taken_up import taken_up
from orchestrator.cluster.watch import Stage, Watch
from orchestrator.forecast.work import pivoting
from orchestrator.store.files import digest_json

if TYPE_CHECKING:
    from orchestrator.cluster.compress_job import Compression


class Pivot:
    """A unit for each linear that is stored pivoted; whatever follows reads it there.

    It stands before training, which trains what is stored, and behind a fit of left factors.
    """

    name: ClassVar[str] = "pivot"
    timings: ClassVar[Mapping[str, float]] = {}

    def __init__(
        self, job: "Compression", worker_class: type[CompressionWorker], task: CompressionTask
    ) -> None:
        self._job = job
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

    def perform(self, crew: Crew, watch: Watch, stage: Stage) -> None:
        """Every linear a call, on whoever is idle."""
        units = self._job.run.units
        self._facts = taken_up(units, self._keys, crew, watch, stage.name)
        missing = {each: rank for each, rank in self._sizes.items() if each.name not in self._facts}

        def on_success(call: Call, value: Any) -> None:
            name = call.arguments[0]
            self._facts[name] = value
            size = units.size(self._keys[name])
            stage.progress(len(self._facts), len(self._keys), unit=name, bytes=size)

        flops = max((pivoting(*each).flops for each in missing.items()), default=0.0)
        calls = [(each.name, (each.name, rank)) for each, rank in missing.items()]
        dispatch(
            crew.pool,
            Bag("pivot", calls),
            FailurePolicy(),
            on_success=on_success,
            on_event=watch.event,
            patience={"pivot": slowly(flops, crew.environment["device"])},
        )

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
