"""`compress` and `evaluate`: the page that is the program.

The driver holds names, curves and the plan; weights, statistics and decompositions are read, made
and written by the workers alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from orchestrator.allocate.base import Scoring
from orchestrator.events import OnEvent
from orchestrator.forecast.outcome import Forecast
from orchestrator.models.checkpoint.output import leased_out
from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import check_towers, resolve
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.workers import WorkerGroup, connected, start_workers
from orchestrator.stage_names import (
    ALLOCATE,
    CALIBRATE,
    EVALUATE,
    READ,
    SCORE,
    SURVEY,
    TASKS,
    WRITE,
)
from orchestrator.stages.admission import check_memory, recheck_memory
from orchestrator.stages.allocate import allocate
from orchestrator.stages.base import Stage
from orchestrator.stages.context.decompose import calibrate_and_decompose, calibration_task
from orchestrator.stages.context.experts import expert_tokens, expert_warnings
from orchestrator.stages.context.keys import assign_keys
from orchestrator.stages.context.previous_run import PreviousRun
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob
from orchestrator.stages.context.values import Keyed, Planned, Scores, Surveyed
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.evaluate.job import commit_report, earlier_report, measure
from orchestrator.stages.evaluate.tasks import TaskEvaluation
from orchestrator.stages.evaluate.values import (
    AskedEvaluation,
    KeyedEvaluation,
    read_text,
    survey_models,
)
from orchestrator.stages.evaluate.worker import EvaluationWorker
from orchestrator.stages.request import ask
from orchestrator.stages.score import score
from orchestrator.stages.survey import left_out, read_calibration, read_held_out, survey
from orchestrator.stages.write.job import finished, layout_of, write_files, write_small_files
from orchestrator.store.lease import Lease
from orchestrator.store.run import RunDirectory


def compress(
    recipe: Recipe, on_event: OnEvent | None = None, previous: PreviousRun | None = None
) -> Result:
    """Perform a recipe, or resume it from its run directory; blocks until the result is written."""
    resolved = resolve(recipe, inherited=() if previous is None else previous.inherited)
    asked = ask(recipe, resolved, previous)
    run, about = asked.run, {"out": str(asked.out), "model": str(asked.model)}
    with (
        _leased(run, asked.description, on_event) as lease,
        RunMonitor(run, on_event, **about) as monitor,
    ):
        monitor.guard(lease)
        with monitor.stage(SURVEY):
            surveyed = survey(asked)
            check_towers(surveyed.linears, resolved)
            if surveyed.survey.unused:
                monitor.note(left_out(asked.model, surveyed.survey.unused))
        monitor.event(_surveyed(surveyed, resolved.stage_names))
        with monitor.stage(READ):
            calibration = read_calibration(surveyed)
            held_out = read_held_out(surveyed, calibration)
            keyed = assign_keys(surveyed, *calibration, held_out)
            for warning in keyed.token_report.get("warnings", ()):
                monitor.note(f"warning: {warning}")
            _describe(keyed, keeps_earlier=True)
        if (result := finished(keyed)) is not None:
            _describe(keyed)
            monitor.note(f"{asked.out} is complete: nothing to do")
            return result
        with leased_out(asked.out, on_event) as lease:
            monitor.guard(lease)
            with connected(asked.recipe, monitor):
                given = keyed.recipe, asked.model, monitor
                forecast = check_memory(*given, survey=keyed.survey)
                return _perform(keyed, resolved.stages, forecast, monitor)


def _describe(keyed: Keyed, *, keeps_earlier: bool = False) -> None:
    """Write the description of the run (see `RunDirectory.claim`)."""
    described = {**keyed.description, "tokens_key": keyed.tokens_key}
    keyed.run.claim(described, keeps_earlier=keeps_earlier)


def _surveyed(surveyed: Surveyed, stages: Sequence[str]) -> dict[str, Any]:
    """Event with the size of the job and the names of its stages.

    Args:
        stages: Names of the stages with units or forecasts, in order.
    """
    before = [name for name in stages if name in (CALIBRATE, SCORE)]
    return {
        "event": "surveyed",
        "blocks": surveyed.survey.num_blocks,
        "group": surveyed.grouping.size,
        "linears": len(surveyed.linears),
        "stages": [SURVEY, READ, *before, ALLOCATE, *stages[len(before) :]],
    }


def _perform(
    keyed: Keyed, stages: Sequence[Stage], forecast: Forecast | None, monitor: RunMonitor
) -> Result:
    most, task = keyed.survey.num_blocks, calibration_task(keyed)
    with start_workers(CompressionWorker, task, keyed.recipe, monitor, most=most) as workers:
        about = keyed.recipe, keyed.model
        forecast = recheck_memory(
            forecast, *about, survey=keyed.survey, workers=workers, monitor=monitor
        )
        _describe(keyed)
        with _running(CALIBRATE, workers, monitor) as stage:
            decomposed = calibrate_and_decompose(keyed, forecast, stage)
            wholes = keyed.method.expert_activations
            tokens = expert_tokens(decomposed.facts)
            for warning in expert_warnings(tokens, keyed.linears, as_wholes=wholes):
                monitor.note(f"warning: {warning}")
        scores = Scores()
        if keyed.allocator.scoring is not Scoring.NONE:
            with _running(SCORE, workers, monitor) as stage:
                scores = score(decomposed, stage)
        with monitor.stage(ALLOCATE):
            planned = allocate(decomposed, scores)
        jobs, done = _jobs(stages, planned), []
        for job, following in zip_longest(jobs, jobs[1:]):
            # its task depends on the plan
            workers = workers.reassigned(job.worker_class, job.task)
            with _running(job.name, workers, monitor) as stage:
                done.append(job.perform(stage, following))
        specs = layout_of(planned)
        with _running(WRITE, workers, monitor) as stage:
            files = write_files(planned, specs, done, stage)
        return write_small_files(planned, specs, files, done, workers=workers, monitor=monitor)


@contextmanager
def _running(name: str, workers: WorkerGroup, monitor: RunMonitor) -> Iterator[RunningStage]:
    """A stage whose beginning, end and seconds are recorded."""
    with monitor.stage(name) as within:
        yield RunningStage(workers, monitor, within)


def _jobs(stages: Sequence[Stage], planned: Planned) -> list[StageJob]:
    """The jobs of the stages after the plan, each made from those before it."""
    jobs: list[StageJob] = []
    for stage in stages:
        jobs.append(stage.job(planned, tuple(jobs)))
    return jobs


def evaluate(asked: AskedEvaluation, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Perform an evaluation, or resume it from its run directory; gives the report."""
    models = {name: str(path) for name, path in asked.models.items()}
    with (
        _leased(asked.run, asked.description, on_event) as lease,
        RunMonitor(asked.run, on_event, **models) as monitor,
    ):
        monitor.guard(lease)
        with monitor.stage(SURVEY):
            surveyed = survey_models(asked)
            for name, model in surveyed.lazy_models.items():
                if model.names.unused:
                    monitor.note(left_out(asked.models[name], model.names.unused))
            tasks = None if surveyed.tasks is None else TaskEvaluation(surveyed)
        keyed = None
        if surveyed.text is not None:
            with monitor.stage(READ):
                keyed = read_text(surveyed)
        asked.run.claim(asked.description)
        report = {} if keyed is None else _evaluate_text(keyed, monitor)
        if tasks is not None:
            with monitor.stage(TASKS) as stage:
                report = {**tasks.perform(stage, monitor), **report}
        return report


def _evaluate_text(keyed: KeyedEvaluation, monitor: RunMonitor) -> dict[str, Any]:
    """Pass a text through the models; gives the report."""
    if (report := earlier_report(keyed)) is not None:
        monitor.note(f"evaluated already, in {keyed.run.root}: nothing to do")
        return report
    most, execution = keyed.num_blocks, keyed.execution
    with (
        connected(execution, monitor),
        start_workers(EvaluationWorker, keyed.task, execution, monitor, most=most) as workers,
    ):
        with _running(EVALUATE, workers, monitor) as stage:
            found = measure(keyed, stage)
        return commit_report(keyed, found)


@contextmanager
def _leased(
    run: RunDirectory, description: Mapping[str, Any], on_event: OnEvent | None
) -> Iterator[Lease]:
    """Lease the run directory for this driver, and describe the job in it.

    Raises:
        UsageError: Another driver holds the lease.
        OrchestratorError: The directory was removed during the run; files that workers wrote to it
            since are removed too.
    """
    is_claimed = False
    try:
        with run.lease().taken(on_event) as lease:
            run.claim(description, keeps_earlier=True)
            lease.depend_on(run.marker)
            is_claimed = True
            yield lease
    except Exception as error:
        if is_claimed and run.is_removed():
            raise run.removed() from error
        raise
    finally:
        if is_claimed and run.is_removed():
            run.remove_remains()
