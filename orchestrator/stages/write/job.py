"""Writing of the result: workers cut and write the files, the driver adds the small ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from orchestrator.errors import UsageError
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.layout import FileSpec, layout
from orchestrator.models.checkpoint.output import check_out, claim_out
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.models.checkpoint.write import finish
from orchestrator.models.forms.config import REDUCED
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.result import REPORT_FILE, Result
from orchestrator.recipe.recipe import ADDED, SCHEDULE
from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stage_names import CALIBRATE
from orchestrator.stages.context.commands import WriteFile
from orchestrator.stages.context.experts import expert_tokens, expert_warnings
from orchestrator.stages.context.keys import WRITE_VERSION
from orchestrator.stages.context.report import make_report
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageResult
from orchestrator.stages.context.values import Keyed, Planned
from orchestrator.stages.context.worker.orders import DirectionScores
from orchestrator.store.files import digest_json
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key
from orchestrator.usage import Usage

Facts = Mapping[str, dict[str, Any]]
"""Facts of the written files, by their names."""


def finished(keyed: Keyed) -> Result | None:
    """The result, if the output directory holds the one that this recipe asks for.

    Otherwise the directory is claimed.

    Raises:
        UsageError: It holds a finished checkpoint of another recipe, or the form of the linears
            that are cut cannot be written.
    """
    if not check_out(keyed.out):
        # a form that cannot be part of the source is refused before anything is computed
        bootstrap_source(keyed.survey.architecture, {keyed.form.name})
        claim_out(keyed.out, keyed.key)
        return None
    report = read_json(keyed.out / REPORT_FILE)
    if report.get("key") != keyed.key:
        raise UsageError(
            f"{keyed.out}: holds a checkpoint made from another recipe, model or text; "
            "name another directory, or remove this one"
        )
    return _result_of(report, keyed.out, keyed.run)


def layout_of(planned: Planned) -> tuple[FileSpec, ...]:
    """The files of the result, and the tensors of each."""
    return layout(
        planned.survey,
        planned.tensors,
        planned.plan,
        output_dtype=parse_dtype(planned.recipe.output_dtype),
        max_shard_bytes=planned.recipe.max_shard_bytes,
    )


def write_files(
    planned: Planned,
    specs: Sequence[FileSpec],
    done: Sequence[StageResult],
    stage: RunningStage,
) -> dict[str, dict[str, Any]]:
    """Cut the stored decompositions to the plan and write the files; gives their facts.

    Args:
        done: Results of the stages after the plan.
    """
    workers, monitor = stage.workers, stage.monitor
    keys = {spec.name: _key(planned, spec, done) for spec in specs}

    def written(name: str, facts: Mapping[str, Any]) -> list[tuple[Place, str]] | None:
        # the unit of a file does not say to which output it was written
        path = planned.out / name
        return [(path, facts["blake2b"])] if path.is_file() else None

    files = reusable_units(
        planned.run.units,
        keys,
        workers,
        monitor,
        stage=stage.name,
        files=written,
    )
    missing = [spec for spec in specs if spec.name not in files]

    def on_success(call: Call, value: Any) -> None:
        name = call.label
        files[name] = value
        unit = planned.run.units.begin(keys[name])
        unit.commit(environment=workers.environment, facts=value)
        about = {"bytes": value["bytes"], **workers.location(call.worker)}
        stage.progress(len(files), len(specs), unit=name, **about)

    calls = [(spec.name, WriteFile(spec.to_json(), *planned.choice)) for spec in missing]
    dispatch(
        workers.pool,
        IndependentCalls(calls, of="files"),
        FailurePolicy(),
        on_success=on_success,
        on_event=monitor.event,
        tally=monitor.tally(),
    )
    return files


def _key(planned: Planned, spec: FileSpec, done: Sequence[StageResult]) -> str:
    inputs = [planned.survey.fingerprint, *planned.block_keys.values(), *planned.chosen_by]
    inputs += [each.key for each in done]
    return unit_key("write", WRITE_VERSION, inputs, spec=digest_json(spec.to_json()))


def write_small_files(
    planned: Planned,
    specs: Sequence[FileSpec],
    files: Facts,
    done: Sequence[StageResult],
    *,
    workers: WorkerGroup,
    monitor: RunMonitor,
) -> Result:
    """Write report, card, index and, last, the config."""
    report = finish(
        planned.out,
        dense=planned.model,
        survey=planned.survey,
        plan=planned.plan,
        files=specs,
        base_model=planned.base_model,
        output_dtype=parse_dtype(planned.recipe.output_dtype),
        recipe=planned.recipe.to_toml(schedule=False),
        report=_report(planned, files, done, _timings(planned, workers, monitor)),
        bootstrap=bootstrap_source(planned.survey.architecture, planned.plan.forms),
    )
    return _result_of(report, planned.out, planned.run)


def _reconstructed(planned: Planned) -> dict[str, str]:
    """Remarks on publications that are known in part, by the method or allocation after them."""
    method, allocation = planned.method, planned.recipe.allocation
    remarks = {
        f"method {method.name}": method.reconstruction,
        f"allocation {allocation}": planned.allocator.reconstruction,
    }
    return {name: remark for name, remark in remarks.items() if remark}


def _report(
    planned: Planned, files: Facts, done: Sequence[StageResult], timings: Mapping[str, Any]
) -> dict[str, Any]:
    asked = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(planned.recipe).items()
    }
    report = make_report(
        survey=planned.survey,
        linears=planned.linears,
        plan=planned.plan,
        budget=planned.budget,
        kind=planned.method.kind,
        facts=_facts(planned, files, done),
        tokens=planned.token_report,
        recipe={
            name: value
            for name, value in asked.items()
            if name not in SCHEDULE and not (name in ADDED and value is None)
        },
        key=planned.key,
        timings=timings,
    )
    report["files"] = {name: file["blake2b"] for name, file in sorted(files.items())}
    if planned.multiples:
        report["rank_multiple"] = dict(planned.multiples)
    if tokens := expert_tokens(planned.facts):
        warnings = expert_warnings(
            tokens, planned.linears, as_wholes=planned.method.expert_activations
        )
        report["experts"] = {"tokens": tokens, "warnings": warnings}
        if planned.plan.reroutes:
            report["experts"]["router"] = REDUCED
    if planned.costs:
        report["costs"] = dict(planned.costs)
    if reconstructed := _reconstructed(planned):
        report["reconstructions"] = reconstructed
    report |= planned.scores.report
    for each in done:
        report[each.name] = each.report
        report["timings"][each.name] = each.timings
    with_gradients = [CALIBRATE] if planned.needs_gradients else []
    with_gradients += [each.name for each in done if each.has_gradients]
    if with_gradients:
        report["gradients"] = {"algorithms": "deterministic", "stages": with_gradients}
    return report


def _timings(planned: Planned, workers: WorkerGroup, monitor: RunMonitor) -> dict[str, Any]:
    """Everything in the report that may differ between two equal runs."""
    recipe = planned.recipe
    return {
        "seconds": {name: round(value, 3) for name, value in monitor.seconds.items()},
        "busy": {name: round(value, 3) for name, value in monitor.busy.items()},
        "workers": monitor.most_workers,
        "nodes": list(workers.nodes),
        "environment": workers.environment,
        **({"made_elsewhere": monitor.made_elsewhere} if monitor.made_elsewhere else {}),
        "schedule": {name: getattr(recipe, name) for name in SCHEDULE if name != "out"},
        "decompose_seconds": sum(facts["timings"]["seconds"] for facts in planned.facts.values()),
        "memory": _memory(planned, monitor),
    }


def _memory(planned: Planned, monitor: RunMonitor) -> dict[str, Any]:
    """Peak memory of a worker by stage, with the forecast of a GPU's."""
    used = dict(monitor.memory)
    for facts in planned.facts.values():
        # units of an earlier run; earlier versions did not record it
        if said := facts["timings"].get("memory"):
            usage = Usage.from_json(said)
            used[CALIBRATE] = usage.merge(used.get(CALIBRATE, usage))
    stages = planned.forecast.stages if planned.forecast else ()
    expected = {each.name: {"forecast": each.device.total} for each in stages}
    return {
        stage: usage.to_json() | (expected.get(stage, {}) if usage.device else {})
        for stage, usage in used.items()
    }


def _first_of(planned: Planned) -> dict[str, str]:
    """Linear that the decomposition is named after, by linear."""
    groups = planned.grouping.groups(planned.linears)
    return {linear.name: group[0].name for group in groups for linear in group}


def _facts(
    planned: Planned, files: Facts, done: Sequence[StageResult]
) -> dict[str, dict[str, Any]]:
    """Facts of the decomposition and measurements of later stages, by linear."""
    results, errors = planned.results, _errors(files)
    learned = planned.scores.learned
    facts = {
        name: {**_in_order(results[first], learned.get(name)), **errors.get(name, {})}
        for name, first in _first_of(planned).items()
    }
    for each in done:
        for name, said in each.numerics.items():
            facts[name]["numerics"] = facts[name]["numerics"] | {each.name: said}
    return facts


def _in_order(facts: Mapping[str, Any], learned: DirectionScores | None) -> Mapping[str, Any]:
    """Facts of a decomposition whose directions are kept in a learned order, if there is one."""
    if learned is None:
        return facts
    curve = {**facts["curve"], "energies": learned.arrange(np.asarray(facts["curve"]["energies"]))}
    named = {n: facts[n] for n in ("activation_energies", "weight_energies") if n in facts}
    ordered = {name: learned.arrange(np.asarray(each)) for name, each in named.items()}
    return {**facts, **ordered, "curve": curve}


def _errors(files: Facts) -> dict[str, Any]:
    """Errors by linear that were measured as files were written."""
    return {name: each for file in files.values() for name, each in file.get("errors", {}).items()}


def _result_of(report: dict[str, Any], out: Place, run: RunDirectory) -> Result:
    """The result of `compress`, with the plan as the report has it."""
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
        reroutes=report.get("experts", {}).get("router") == REDUCED,
    )
    kept, parameters = report["kept"], report["values"]["model_after"]
    run.record_output(
        out, {"kept": kept["asked"], "of": kept["asked_of"], "parameters": parameters}
    )
    return Result(out=out, run_dir=run.root, plan=plan, report=report)
