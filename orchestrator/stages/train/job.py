"""Training of the whole compressed model, as a pipeline over its shards: the driver's part."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.models.training.train_options import Course, TrainOptions, plan_course
from orchestrator.progress.tally import Ahead
from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.verify import verified_units
from orchestrator.runtime.worker import Worker
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.decompose import block_pass, compression_task
from orchestrator.stages.context.pipeline.commands import CommitTrained, TakeShard, Turn, Update
from orchestrator.stages.context.pipeline.program import work_left
from orchestrator.stages.context.pipeline.schedule import Pipeline
from orchestrator.stages.context.pipeline.shard import snapshot_key
from orchestrator.stages.context.pipeline.snapshot import Snapshot
from orchestrator.stages.context.pipeline.targets import make_targets, target_keys
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.tokens import read_tokens
from orchestrator.stages.context.trained_units import changed_blocks, trained_units
from orchestrator.stages.context.values import Planned
from orchestrator.stages.train.worker import TrainSettings, TrainWorker, best_key
from orchestrator.store.units import unit_key

TRAIN_VERSION = {"all": 2, "lean": 2, "light": 3}
"""Raised when a tensor that is trained in the mode changes."""
BYTES = {"all": 16, "lean": 12, "light": 16}
"""Bytes of value, gradient and moments of a trained parameter."""

RECONSTRUCTION = (
    "of LPAF (arXiv 2306.14152) the abstract names mixed-rank fine-tuning; the course of the mixed "
    "steps, and the dense weight as their start for other methods, are ours"
)
"""Said in the report of a mixed training."""


class TrainJob(StageJob):
    """All blocks at once, towards the next-token distribution of the dense model, and the text.

    The dense model passes once and leaves its top-k. Then each worker holds one shard, whatever
    `shards` is in the recipe, and steps pass through them (`Pipeline`). The result of a step does
    not depend on the cut, and after a loss all workers return to a snapshot, so neither workers
    nor losses change a bit. The blocks become the best state by the held-out loss, the start
    included.

    A snapshot takes 12 bytes a trained value in the run directory (`all`; 8 `lean`), and the last
    one and the best are kept, beside the one that is being written. If the forecast finds this too
    much (`cost`), only the values at the best step are kept, as they will be written,
    and training begins again after a loss.
    """

    name = "train"
    worker_class: type[Worker] = TrainWorker

    def __init__(
        self, planned: Planned, earlier: Sequence[StageJob], options: TrainOptions, mode: str
    ) -> None:
        self._options, self._mode = options, mode
        self._planned = planned
        self._units = trained_units(
            planned,
            earlier,
            name=self.name,
            version=TRAIN_VERSION[mode],
            blocks=changed_blocks(planned),
            options=options.to_json(),
            mode=mode,
        )
        self.key = self._units.key
        self.keys = self.trained_units = self._units.keys
        self._course = self._planned_course()
        self._keeps_states = planned.forecast is None or planned.forecast.keeps_states

    @cached_property
    def _target_keys(self) -> tuple[str, ...]:
        """Keys of the units of the dense model's top-k; empty if they are recomputed."""
        if self._options.targets == "recomputed":
            return ()
        return target_keys(self._planned, self._options)

    @property
    def task(self) -> CompressionTask:
        settings = TrainSettings(
            units=self._units,
            options=self._options,
            mode=self._mode,
            target_keys=self._target_keys,
            mixed_steps=self._course.mixed_steps,
        )
        return compression_task(self._planned, pass_key=self.key, settings=settings)

    def _planned_course(self) -> Course:
        sequences = self._planned.sequences
        if sequences < 2:
            raise UsageError(
                f"train is {self._mode!r} and there is {sequences} sequence; two are needed, "
                "one to train on and one to hold out"
            )
        return plan_course(self._options, sequences, self._planned.randomness)

    def perform(self, stage: RunningStage, following: StageJob | None = None) -> StageResult:
        """Targets, steps, and a unit for each block with its values at the best step."""
        passes = block_pass(self._planned, self._planned.forecast)
        done = passes.committed(self.keys, stage)
        if done.keys() == self.keys.keys():
            untrained = {"snapshots": [], "best": 0, "stop": "end", "numbers": 0}
            return self._result(next(iter(done.values()), untrained))
        shards = [(self._planned.survey.num_blocks, ())]
        steps = work_left(shards, self._course, keeps_states=self._keeps_states)
        ahead = Ahead(to_do=steps | self._commits(done))
        make_targets(self._planned, self.key, self._target_keys, stage, ahead=ahead)
        facts = self._train(stage, done)
        self._commit(stage, done, facts)
        return self._result(facts)

    def _train(self, stage: RunningStage, done: Collection[int]) -> dict[str, Any]:
        """Perform the steps after the last snapshot; gives the facts of the training."""
        job, course = self._planned, self._course
        workers, monitor = stage.workers, stage.monitor
        read = read_tokens(job.run, job.tokens_key)
        mask = read.mask
        # the loss is of all tokens; the throughput is that of text, as the report counts it
        is_text = mask if read.is_image is None else mask & ~read.is_image
        text = is_text.sum(axis=1).tolist()
        lengths = [(int(row.sum()), int((row[1:] & row[:-1]).sum())) for row in mask]
        snapshots, numbers = self._left(workers, monitor, done)
        if not snapshots:
            # the units that it describes are about to be overwritten
            job.run.units.drop(self._progress_key)
        pipeline = Pipeline(
            course,
            lengths,
            num_blocks=job.survey.num_blocks,
            group=job.grouping.size,
            snapshots=snapshots,
            keeps_states=self._keeps_states,
        )
        steps, tokens, begun = 0, 0, time.monotonic()

        def on_success(call: Call, value: Any) -> None:
            nonlocal steps, tokens
            before = len(pipeline.snapshots)
            pipeline.record_result(call, value)
            if isinstance(call.command, TakeShard):
                numbers.update(value["numbers"])
            elif isinstance(call.command, Turn):
                tokens += text[call.command.sequence]
            elif isinstance(call.command, Update) and call.shard == 0:
                steps, step = steps + 1, call.command.step
                speed = tokens / (time.monotonic() - begun)
                stage.progress(step, course.steps, unit=f"step {step}", tokens_per_second=speed)
            if len(pipeline.snapshots) > before:
                if self._keeps_states or pipeline.stop in ("end", "patience"):
                    self._note(pipeline, numbers, workers)
                monitor.event({"event": "snapshot", **asdict(pipeline.snapshots[-1])})

        dispatch(
            workers.pool,
            pipeline,
            FailurePolicy(),
            on_success=on_success,
            is_awaited=pipeline.is_awaited,
            on_event=monitor.event,
            tally=monitor.tally(Ahead(to_do=self._commits(done))),
        )
        return {
            "snapshots": [asdict(each) for each in pipeline.snapshots],
            "best": pipeline.best.step,
            "stop": pipeline.stop,
            "numbers": sum(numbers.values()),
            "timings": {"steps": steps, "tokens": tokens, "seconds": time.monotonic() - begun},
        }

    @property
    def _progress_key(self) -> str:
        """Key of the unit that names the last snapshot."""
        return unit_key("snapshots", TRAIN_VERSION[self._mode], [self.key])

    def _left(
        self, workers: WorkerGroup, monitor: RunMonitor, done: Collection[int]
    ) -> tuple[list[Snapshot], dict[int, int]]:
        """Snapshots of an earlier run and numbers of trained values, if no unit is damaged.

        Without stored states only a training that has ended counts; committed groups of blocks need
        no unit.
        """
        first_of = self._planned.grouping.first
        open_groups = {first_of(block) for block in self.keys if block not in done}
        units = self._planned.run.units
        key = {"snapshots": self._progress_key}
        left = reusable_units(units, key, workers, monitor, stage="training", is_all=False)
        if not left:
            return [], {}
        facts = left["snapshots"]
        if facts["states"] != self._keeps_states:
            return [], {}
        snapshots = [Snapshot(**each) for each in facts["snapshots"]]
        numbers = {int(block): count for block, count in facts["numbers"].items()}
        hashes = {
            f"step {step}, block {block}": units.hashes(self._kept_key(step, block))
            for step in facts["kept"]
            for block in numbers
            if self._keeps_states or first_of(block) in open_groups
        }
        if not all(hashes.values()) or len(verified_units(workers, monitor, hashes)) < len(hashes):
            return [], {}
        step = snapshots[-1].step
        monitor.note(f"training goes on from step {step}", stage=self.name, step=step)
        return snapshots, numbers

    def _note(self, pipeline: Pipeline, numbers: dict[int, int], workers: WorkerGroup) -> None:
        """Commits that a snapshot is complete; removes those that are neither last nor best.

        Without stored states this is the end of the training, and only the best values exist.
        """
        units = self._planned.run.units
        needed = {pipeline.step, pipeline.best.step} if self._keeps_states else {pipeline.best.step}
        kept = sorted(needed - {0})
        facts = {
            "states": self._keeps_states,
            "snapshots": [asdict(each) for each in pipeline.snapshots],
            "numbers": {str(block): count for block, count in sorted(numbers.items())},
            "kept": kept,
        }
        unit = units.begin(self._progress_key)
        unit.commit(environment=workers.environment, facts=facts)
        if self._keeps_states:
            self._drop([each.step for each in pipeline.snapshots if each.step not in kept])

    def _kept_key(self, step: int, block: int) -> str:
        """Unit of a block's state, or of its best values, at a step."""
        if self._keeps_states:
            return snapshot_key(self.key, step, block)
        return best_key(self.key, block)

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            for block in self.keys:
                self._planned.run.units.drop(self._kept_key(step, block))

    def _commits(self, done: Collection[int]) -> dict[str, float]:
        """Number of calls that commit groups of blocks."""
        first_of = self._planned.grouping.first
        return {"commit": float(len({first_of(block) for block in self.keys if block not in done}))}

    def _commit(self, stage: RunningStage, done: Collection[int], facts: Mapping[str, Any]) -> None:
        """Commit the trained blocks, group by group; then no snapshot is needed any more."""
        job = self._planned
        groups = sorted({job.grouping.first(block) for block in self.keys if block not in done})
        size, best = job.grouping.size, facts["best"]
        is_kept = best > 0 and not self._keeps_states

        def on_success(call: Call, value: Any) -> None:
            assert isinstance(call.command, CommitTrained)
            for block in range(*call.command.blocks):
                job.run.units.drop(best_key(self.key, block))

        bag = IndependentCalls(
            [
                (
                    f"block {first}, commit",
                    CommitTrained(
                        (first, min(first + size, job.survey.num_blocks)),
                        best,
                        facts,
                        is_kept,
                    ),
                )
                for first in groups
            ],
            of="blocks",
        )
        dispatch(
            stage.workers.pool,
            bag,
            FailurePolicy(),
            on_success=on_success,
            on_event=stage.monitor.event,
            tally=stage.monitor.tally(),
        )
        self._drop([each["step"] for each in facts["snapshots"]])
        job.run.units.drop(self._progress_key)

    def _result(self, facts: Mapping[str, Any]) -> StageResult:
        """Losses of the training and its cost, by the facts of its units.

        The timings are those of the last run that trained, with steps repeated after a loss.
        """
        numbers, snapshots = facts["numbers"], facts["snapshots"]
        steps = snapshots[-1]["step"] if snapshots else 0
        used = [index for batch in self._course.batches[:steps] for index in batch]
        token_bytes = 8 * self._options.top_k + 4 if self._target_keys else 0
        tokens = self._planned.token_report["sequence_length"]
        report = {
            "mode": self._mode,
            "options": self._options.to_json(),
            "errors": "errors of linears are those before the model was trained",
            "snapshots": snapshots,
            "best_step": facts["best"],
            "stop": facts["stop"],
            "steps": steps,
            "sequences": len(used),
            "numbers": numbers,
            "bytes": {
                "training": BYTES[self._mode] * numbers,
                "targets": token_bytes * tokens * self._planned.sequences,
            },
        }
        if self._options.mixed:
            report["reconstruction"] = RECONSTRUCTION
        return StageResult(
            name=self.name,
            key=self.key,
            report=report,
            timings=facts.get("timings", {}),
            has_gradients=True,
        )
