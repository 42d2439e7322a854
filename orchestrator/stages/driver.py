"""`compress` and `evaluate`: the page that is the program.

The driver holds names, curves and the plan; weights, statistics and decompositions are read, made
and written by the workers alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import Recipe
from orchestrator.runtime.monitor import OnEvent, RunMonitor
from orchestrator.runtime.workers import connected, start_workers
from orchestrator.stages.context.admission import check_memory, recheck_memory
from orchestrator.stages.context.compression import Compression
from orchestrator.stages.context.previous_run import PreviousRun
from orchestrator.stages.evaluate.job import Evaluation
from orchestrator.stages.evaluate.worker import EvaluationWorker
from orchestrator.stages.write.job import Writing
from orchestrator.store.lease import Lease


def compress(
    recipe: Recipe, on_event: OnEvent | None = None, before: PreviousRun | None = None
) -> Result:
    """Performs a recipe, from where its run directory says it stands; blocks."""
    job = Compression(recipe, before)
    about = {"out": str(job.out), "model": str(job.model)}
    with _held(job, on_event) as hold, RunMonitor(job.run, on_event, **about) as monitor:
        monitor.guard(hold)
        with monitor.stage("survey"):
            job.survey()
        with monitor.stage("read"):
            job.read_text()
        if (result := job.finished()) is not None:
            monitor.note(f"{job.out} is complete: nothing to do")
            return result
        with job.hold_out().taken(on_event) as hold:
            monitor.guard(hold)
            with connected(job.execution, monitor):
                job.foreseen = check_memory(job.recipe, job.model, job.execution, monitor)
                return _perform(job, monitor)


def _perform(job: Compression, monitor: RunMonitor) -> Result:
    most = job.surveyed.num_blocks
    with start_workers(job.worker_class, job.task, job.execution, most, monitor) as workers:
        about = job.recipe, job.model, job.execution
        job.foreseen = recheck_memory(job.foreseen, *about, workers, monitor)
        with monitor.stage("calibrate") as stage:
            job.calibrate_and_decompose(workers, monitor, stage)
        if job.scores:
            with monitor.stage("score") as stage:
                job.score(workers, monitor, stage)
        with monitor.stage("allocate"):
            job.allocate()
        for after in job.after:
            # what it does starts from the plan, so the workers learn of it here
            workers = workers.reassigned(after.worker_class, after.task)
            with monitor.stage(after.name) as stage:
                after.perform(workers, monitor, stage)
        writing = Writing(job)
        with monitor.stage("write") as stage:
            writing.perform(workers, monitor, stage)
        return writing.finish(workers, monitor)


def evaluate(job: Evaluation, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Performs an evaluation, from where its run directory says it stands; gives the report."""
    models = {name: str(path) for name, path in job.models.items()}
    with _held(job, on_event) as hold, RunMonitor(job.run, on_event, **models) as monitor:
        monitor.guard(hold)
        with monitor.stage("survey"):
            job.survey()
        with monitor.stage("read"):
            job.read_text()
        if (report := job.finished()) is not None:
            monitor.note(f"evaluated already, in {job.run.root}: nothing to do")
            return report
        with (
            connected(job.execution, monitor),
            start_workers(
                EvaluationWorker, job.task, job.execution, job.num_blocks, monitor
            ) as workers,
        ):
            with monitor.stage("evaluate") as stage:
                job.score(workers, monitor, stage)
            return job.report(workers)


@contextmanager
def _held(job: Compression | Evaluation, on_event: OnEvent | None) -> Iterator[Lease]:
    """Keeps the run directory for this driver, and makes it the job's."""
    with job.run.hold().taken(on_event) as hold:
        job.claim()
        yield hold
