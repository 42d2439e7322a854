"""The last two verbs of a compression: files cut and written by workers, and what stands beside."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.checkpoint.layout import FileSpec, layout
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.models.checkpoint.write import finish
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import SCHEDULE
from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.report import make_report
from orchestrator.stages.context.trained_stage import TrainedStage
from orchestrator.stages.pivot.job import Pivot
from orchestrator.stages.refit.job import Refit
from orchestrator.store.files import digest_json
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key
from orchestrator.usage import Usage

if TYPE_CHECKING:
    from orchestrator.stages.context.compression import Compression

WRITE_VERSION = 2
"""Raised when the bytes of a written file change, or what is said of it."""


class Writing:
    """What becomes of a plan, once all that is done to the cut factors is done."""

    def __init__(self, job: "Compression") -> None:
        self.job = job

    def perform(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Workers cut the stored decompositions to the plan, and write the checkpoint's files."""
        self._specs = layout(
            self.job.surveyed,
            self.job.tensors,
            self.job.plan,
            output_dtype=parse_dtype(self.job.recipe.output_dtype),
            max_shard_bytes=self.job.recipe.max_shard_bytes,
        )
        keys = {spec.name: self._key(spec) for spec in self._specs}
        self._files = reusable_units(
            self.job.run.units,
            keys,
            workers,
            monitor,
            stage.name,
            files=lambda name, facts: [(self.job.out / name, facts["blake2b"])],
        )
        missing = [spec for spec in self._specs if spec.name not in self._files]

        def on_success(call: Call, value: Any) -> None:
            name = call.label
            self._files[name] = value
            unit = self.job.run.units.begin(keys[name])
            unit.commit(environment=workers.environment, facts=value)
            stage.progress(len(self._files), len(self._specs), unit=name, bytes=value["bytes"])

        bag = IndependentCalls(
            "write", [(spec.name, (spec.to_json(), *self.job.choice)) for spec in missing]
        )
        dispatch(workers.pool, bag, FailurePolicy(), on_success=on_success, on_event=monitor.event)

    def _key(self, spec: FileSpec) -> str:
        inputs = [self.job.surveyed.fingerprint, *self.job.block_keys.values(), *self.job.choice]
        inputs += [after.key for after in self.job.after]
        return unit_key("write", WRITE_VERSION, inputs, spec=digest_json(spec.to_json()))

    def finish(self, workers: WorkerGroup, monitor: RunMonitor) -> Result:
        """The small files of the checkpoint, config last."""
        job = self.job
        report = self._report(self._timings(workers, monitor))
        finish(
            job.out,
            dense=job.model,
            survey=job.surveyed,
            plan=job.plan,
            files=self._specs,
            base_model=job.base_model,
            output_dtype=parse_dtype(job.recipe.output_dtype),
            recipe=job.recipe.to_toml(schedule=False),
            report=report,
            bootstrap=bootstrap_source(job.surveyed.architecture),
        )
        return result_of(report, job.out, job.run)

    def _report(self, timings: Mapping[str, Any]) -> dict[str, Any]:
        job = self.job
        asked = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(job.recipe).items()
        }
        report = make_report(
            survey=job.surveyed,
            linears=job.linears,
            plan=job.plan,
            kind=job.method.kind,
            facts=self._facts(),
            tokens=job.token_report,
            recipe={name: value for name, value in asked.items() if name not in SCHEDULE},
            key=job.key,
            timings=timings,
        )
        report["files"] = {name: file["blake2b"] for name, file in sorted(self._files.items())}
        if job.masks:
            report["cap"] = job.learnt.report
        if job.measures:
            report["strs"] = job.measured.report
        for after in job.after:
            report[after.name] = after.report
            report["timings"][after.name] = after.timings
        if stages := self._stages_with_gradients():
            report["gradients"] = {"algorithms": "deterministic", "stages": stages}
        return report

    def _stages_with_gradients(self) -> list[str]:
        trained = [each for each in self.job.after if isinstance(each, TrainedStage)]
        calibrates = ["calibrate"] if self.job.needs_gradients else []
        return calibrates + [each.name for each in trained if each.has_gradients]

    def _timings(self, workers: WorkerGroup, monitor: RunMonitor) -> dict[str, Any]:
        """All that may differ between two equal runs."""
        decomposed = [facts["timings"] for facts in self.job.facts.values()]
        recipe = self.job.recipe
        return {
            "seconds": {name: round(value, 3) for name, value in monitor.seconds.items()},
            "busy": {name: round(value, 3) for name, value in monitor.busy.items()},
            "workers": monitor.most_workers,
            "nodes": list(workers.nodes),
            "environment": workers.environment,
            **({"made_elsewhere": monitor.made_elsewhere} if monitor.made_elsewhere else {}),
            "schedule": {name: getattr(recipe, name) for name in SCHEDULE if name != "out"},
            "decompose_seconds": sum(each["seconds"] for each in decomposed),
            "memory": self._memory(monitor),
        }

    def _memory(self, monitor: RunMonitor) -> dict[str, Any]:
        """Peak memory of a worker by stage, with the forecast of a GPU's."""
        used = dict(monitor.memory)
        for facts in self.job.facts.values():
            # units of an earlier run; earlier versions did not record it
            if said := facts["timings"].get("memory"):
                usage = Usage.from_json(said)
                used["calibrate"] = usage.merge(used.get("calibrate", usage))
        stages = self.job.foreseen.stages if self.job.foreseen else ()
        foreseen = {each.name: {"forecast": each.device.total} for each in stages}
        return {
            stage: usage.to_json() | (foreseen.get(stage, {}) if usage.device else {})
            for stage, usage in used.items()
        }

    @property
    def _first_of(self) -> dict[str, str]:
        """By linear, the one that its decomposition is named after."""
        groups = self.job.grouping.groups(self.job.linears)
        return {linear.name: group[0].name for group in groups for linear in group}

    def _facts(self) -> dict[str, dict[str, Any]]:
        """By linear, what its decomposition said and what was measured of it later."""
        results, errors = self.job.results, self._errors()
        facts = {
            name: results[first] | errors.get(name, {}) for name, first in self._first_of.items()
        }
        for after in self.job.after:
            if isinstance(after, Pivot | Refit):
                for name, said in after.measured.items():
                    facts[name]["numerics"] = facts[name]["numerics"] | {after.name: said}
        return facts

    def _errors(self) -> dict[str, Any]:
        """Return errors that were measured as files were written, by linear."""
        files = self._files.values()
        return {name: each for file in files for name, each in file.get("errors", {}).items()}


def result_of(report: dict[str, Any], out: Place, run: RunDirectory) -> Result:
    """What `compress` gives, from what the report says of it."""
    linears = report["linears"].items()
    sizes = ("form", "rank", "nonzeros", "basis")
    assignments = {
        name: Assignment(**{size: entry[size] for size in sizes if size in entry})
        for name, entry in linears
    }
    plan = Plan(
        assignments=assignments,
        budget_values=report["values"]["budget"],
        stored_values=report["values"]["stored"],
    )
    return Result(out=out, run_dir=run.root, plan=plan, report=report)
