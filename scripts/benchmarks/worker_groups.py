"""Actors compared with bare processes, and an actor compared with the worker in this process.

The work is that of `orchestrator compress`, by the functions of its driver.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bare import BareProcesses
from benchmarks.common.figures import Figure, compare, in_turns, say
from benchmarks.common.watching import cpu_seconds, family

from orchestrator.models.checkpoint.output import claim_out
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve
from orchestrator.runtime.calls import IndependentCalls, Open
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.workers import WorkerGroup, connected, start_workers
from orchestrator.stage_names import CALIBRATE, WRITE
from orchestrator.stages.allocate import allocate
from orchestrator.stages.context.decompose import calibrate_and_decompose, calibration_task
from orchestrator.stages.context.keys import assign_keys
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Keyed, Scores
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.request import ask
from orchestrator.stages.survey import read_calibration, survey
from orchestrator.stages.write.job import layout_of, write_files, write_small_files

SPEED_TARGET = 0.92
RAY_TARGET = 1.15


class Job:
    """Compression with running, warm workers, whose stages can be repeated."""

    def __init__(self, keyed: Keyed, workers: WorkerGroup, monitor: RunMonitor) -> None:
        self._keyed, self._workers, self._monitor = keyed, workers, monitor

    @property
    def num_blocks(self) -> int:
        return self._keyed.survey.num_blocks

    def clear(self) -> None:
        """Remove the results of earlier turns."""
        shutil.rmtree(self._keyed.run.units.root)
        shutil.rmtree(self._keyed.out)
        read_calibration(self._keyed)
        claim_out(self._keyed.out)

    def calibrate_and_decompose(self) -> float:
        self.clear()
        start = time.perf_counter()
        self._calibrate()
        return time.perf_counter() - start

    def everything(self) -> float:
        """Run from the first chunk to the last file of the checkpoint."""
        self.clear()
        start = time.perf_counter()
        planned = allocate(self._calibrate(), Scores())
        specs, about = layout_of(planned), (self._workers, self._monitor)
        with self._monitor.stage(WRITE) as stage:
            files = write_files(planned, specs, (), RunningStage(*about, stage))
        workers, monitor = about
        write_small_files(planned, specs, files, (), workers=workers, monitor=monitor)
        return time.perf_counter() - start

    def _calibrate(self) -> Decomposed:
        with self._monitor.stage(CALIBRATE) as stage:
            running = RunningStage(self._workers, self._monitor, stage)
            return calibrate_and_decompose(self._keyed, None, running)


@contextmanager
def warm_job(recipe: Recipe) -> Iterator[Job]:
    """Start workers that have imported their packages and opened the model once."""
    asked = ask(recipe, resolve(recipe))
    asked.run.claim(asked.description)
    with RunMonitor(asked.run, None) as monitor:
        surveyed = survey(asked)
        keyed = assign_keys(surveyed, *read_calibration(surveyed))
        claim_out(keyed.out)
        task, execution = calibration_task(keyed), keyed.recipe
        most = keyed.survey.num_blocks
        with (
            connected(execution, monitor),
            start_workers(CompressionWorker, task, execution, monitor, most=most) as workers,
        ):
            opening = IndependentCalls([("warm up", Open((0, 1)))] * workers.size)
            dispatch(
                workers.pool,
                opening,
                FailurePolicy(),
                on_success=lambda call, value: None,
                on_event=monitor.event,
            )
            yield Job(keyed, workers, monitor)


def recipe_for(
    model: Path,
    text: Path,
    work: Path,
    name: str,
    *,
    executor: str,
    workers: int,
    samples: int,
    sequence_length: int,
) -> Recipe:
    return Recipe(
        model=str(model),
        out=str(work / name),
        method="svd-llm",
        keep=0.8,
        calibration=str(text),
        samples=samples,
        sequence_length=sequence_length,
        dtype="float32",
        executor=executor,
        workers=workers,
        threads=1,
        shards=None,
    )


def actors_against_bare(
    model: Path, text: Path, work: Path, *, samples: int, sequence_length: int, repeats: int
) -> list[Figure]:
    """Compare two actors with two processes without Ray and store; see `benchmarks.bare`.

    Measures wall time, and the CPU seconds of all processes of either side, including those of Ray;
    on a busy machine the second is more stable.
    """
    recipe = recipe_for(
        *(model, text, work, "two"),
        executor="ray",
        workers=2,
        samples=samples,
        sequence_length=sequence_length,
    )
    with warm_job(recipe) as job:
        cut = cut_blocks(job.num_blocks, default_shards(job.num_blocks, 2))
        halves = [list(cut[side::2]) for side in range(2)]
        sizes = {"samples": samples, "sequence_length": sequence_length}
        with BareProcesses(model, text, halves, **sizes) as bare:
            say("two actors against two bare processes")
            actors = MeasuredCandidate(
                job.calibrate_and_decompose, lambda: family(os.getpid()) - bare.pids
            )
            alone = MeasuredCandidate(bare.work, lambda: bare.pids)
            in_turns({"actors": actors, "bare": alone}, repeats)
    figures = []
    for says, of_actors, of_bare, target in [
        ("speed", actors.seconds, alone.seconds, SPEED_TARGET),
        ("by CPU seconds", actors.cpu_seconds, alone.cpu_seconds, None),
    ]:
        figures.append(
            compare(
                f"two actors against two bare processes, {says}",
                [job.num_blocks / each for each in of_actors],
                [job.num_blocks / each for each in of_bare],
                unit="blocks/s",
                target=target,
                at_least=True,
            )
        )
    return figures


class MeasuredCandidate:
    """Candidate that returns its own seconds; keeps them, and the CPU seconds of some processes."""

    def __init__(self, way: Callable[[], float], pids: Callable[[], set[int]]) -> None:
        self._way, self._pids = way, pids
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def __call__(self) -> float:
        before = cpu_seconds(self._pids())
        self.seconds.append(self._way())
        self.cpu_seconds.append(cpu_seconds(self._pids()) - before)
        return self.seconds[-1]


def ray_against_local(
    model: Path, text: Path, work: Path, *, samples: int, sequence_length: int, repeats: int
) -> list[Figure]:
    """Compare the whole job except its start: by one actor, and by the worker in this process."""

    def recipe(executor: str) -> Recipe:
        return recipe_for(
            *(model, text, work, executor),
            executor=executor,
            workers=1,
            samples=samples,
            sequence_length=sequence_length,
        )

    with warm_job(recipe("ray")) as actor, warm_job(recipe("local")) as local:
        say("one actor against the local executor")
        seconds = in_turns({"ray": actor.everything, "local": local.everything}, repeats)
    return [
        compare(
            "one actor against --executor local, time",
            seconds["ray"],
            seconds["local"],
            unit="s",
            target=RAY_TARGET,
        )
    ]
