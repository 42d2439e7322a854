"""`compress` and `evaluate`: the page that is the program.

The driver holds names, curves and the plan; weights, statistics and decompositions are read, made
and written by the workers alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import Recipe
from orchestrator.runtime.monitor import OnEvent, Watch
from orchestrator.runtime.workers import assemble, connected
from orchestrator.stages.context.admission import foresee, foresee_again
from orchestrator.stages.context.compression import Compression
from orchestrator.stages.context.previous_run import Before
from orchestrator.stages.evaluate.job import Evaluation
from orchestrator.stages.evaluate.worker import EvaluationWorker
from orchestrator.stages.write.job import Writing
from orchestrator.store.lease import Hold


def compress(
    recipe: Recipe, on_event: OnEvent | None = None, before: Before | None = None
) -> Result:
    """Performs a recipe, from where its run directory says it stands; blocks."""
    job = Compression(recipe, before)
    about = {"out": str(job.out), "model": str(job.model)}
    with _held(job, on_event) as hold, Watch(job.run, on_event, **about) as watch:
        watch.guard(hold)
        with watch.stage("survey"):
            job.survey()
        with watch.stage("read"):
            job.read_text()
        if (result := job.finished()) is not None:
            watch.note(f"{job.out} is complete: nothing to do")
            return result
        with job.hold_out().taken(on_event) as hold:
            watch.guard(hold)
            with connected(job.schedule, watch):
                job.foreseen = foresee(job.recipe, job.model, job.schedule, watch)
                return _perform(job, watch)


def _perform(job: Compression, watch: Watch) -> Result:
    most = job.surveyed.num_blocks
    with assemble(job.worker_class, job.task, job.schedule, most, watch) as crew:
        about = job.recipe, job.model, job.schedule
        job.foreseen = foresee_again(job.foreseen, *about, crew, watch)
        with watch.stage("calibrate") as stage:
            job.calibrate_and_decompose(crew, watch, stage)
        if job.scores:
            with watch.stage("score") as stage:
                job.score(crew, watch, stage)
        with watch.stage("allocate"):
            job.allocate()
        for after in job.after:
            # what it does starts from the plan, so the workers learn of it here
            crew = crew.turned_to(after.worker_class, after.task)
            with watch.stage(after.name) as stage:
                after.perform(crew, watch, stage)
        writing = Writing(job)
        with watch.stage("write") as stage:
            writing.perform(crew, watch, stage)
        return writing.finish(crew, watch)


def evaluate(job: Evaluation, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Performs an evaluation, from where its run directory says it stands; gives the report."""
    models = {name: str(path) for name, path in job.models.items()}
    with _held(job, on_event) as hold, Watch(job.run, on_event, **models) as watch:
        watch.guard(hold)
        with watch.stage("survey"):
            job.survey()
        with watch.stage("read"):
            job.read_text()
        if (report := job.finished()) is not None:
            watch.note(f"evaluated already, in {job.run.root}: nothing to do")
            return report
        with (
            connected(job.schedule, watch),
            assemble(EvaluationWorker, job.task, job.schedule, job.num_blocks, watch) as crew,
        ):
            with watch.stage("evaluate") as stage:
                job.score(crew, watch, stage)
            return job.report(crew)


@contextmanager
def _held(job: Compression | Evaluation, on_event: OnEvent | None) -> Iterator[Hold]:
    """Keeps the run directory for this driver, and makes it the job's."""
    with job.run.hold().taken(on_event) as hold:
        job.claim()
        yield hold
