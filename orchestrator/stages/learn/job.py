"""Learning of the scores of directions, as a pipeline over the shards: the driver's part."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

from orchestrator.allocate.scored import GateAllocator
from orchestrator.errors import InputError, UsageError
from orchestrator.models.training.gate_scores import num_directions
from orchestrator.models.training.train_options import Course
from orchestrator.progress.tally import Ahead
from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.verify import verified_units
from orchestrator.stages.context.decompose import block_pass, compression_task
from orchestrator.stages.context.pipeline.commands import Turn
from orchestrator.stages.context.pipeline.program import work_left
from orchestrator.stages.context.pipeline.shard import snapshot_key
from orchestrator.stages.context.pipeline.snapshot import Snapshot
from orchestrator.stages.context.pipeline.targets import make_targets, target_keys
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.tokens import read_tokens
from orchestrator.stages.context.values import Decomposed, Scores
from orchestrator.stages.context.worker.orders import read_scores
from orchestrator.stages.learn.commands import CommitScores, UpdateScores
from orchestrator.stages.learn.schedule import Counts, LearnPipeline, plan_learning
from orchestrator.stages.learn.worker import LearnSettings
from orchestrator.store.units import unit_key

LEARN_VERSION = 1
"""Raised when a score changes."""
RECONSTRUCTION = (
    "of SoCo (arXiv 2502.15092) by its abstract; losses, rates and lengths of phases are ours"
)
"""Remark of the report on polarised gates."""


class Learning:
    """Scores of all directions of all linears, a unit for each block; see `allocate.learned`.

    Each worker holds one shard of the dense model with gates, and steps pass through them
    (`LearnPipeline`). Neither workers nor losses change a bit: after a loss all return to the last
    snapshot. The keys of the units hold neither a size nor a plan, so any other size finds them.
    """

    def __init__(self, job: Decomposed, allocator: GateAllocator) -> None:
        self._job, self._allocator = job, allocator
        options = {"options": allocator.decisive(), "seed": job.randomness.seed}
        inputs = [job.pass_key, *job.block_keys.values()]
        self._key = unit_key("learn", LEARN_VERSION, inputs, **options)
        self._gates = {
            each.name: count
            for each in job.linears
            if (count := num_directions(each, job.form, allocator.adapters))
        }
        blocks = sorted({each.block for each in job.linears if each.name in self._gates})
        self.keys = {
            block: unit_key("learn block", LEARN_VERSION, [self._key], block=block)
            for block in blocks
        }
        """Keys of the units, by block."""

    @cached_property
    def _course(self) -> Course:
        sequences = self._job.sequences
        if sequences < 2:
            raise UsageError(
                f"the allocation learns and there is {sequences} sequence; two are needed, one "
                "to learn on and one to hold out"
            )
        return plan_learning(self._allocator, sequences, self._job.randomness)

    @cached_property
    def _target_keys(self) -> tuple[str, ...]:
        return target_keys(self._job, self._course.options) if self._allocator.divergence else ()

    @property
    def task(self) -> CompressionTask:
        """The task of the workers."""
        settings = LearnSettings(
            options=self._course.options,
            penalty_by=self._allocator.penalty_by,
            tail=self._allocator.tail,
            adapters=self._allocator.adapters,
            randomness=self._job.randomness,
            polarises=self._allocator.polarises,
            keys=self.keys,
            target_keys=self._target_keys,
        )
        return compression_task(self._job, pass_key=self._key, settings=settings)

    def learn(self, stage: RunningStage) -> Scores:
        """Learn the scores that no reusable unit has; gives all of them.

        Raises:
            InputError: A loss or a gradient is not finite.
        """
        job = self._job
        done = block_pass(job, job.forecast).committed(self.keys, stage)
        if done.keys() != self.keys.keys():
            steps = work_left([(job.survey.num_blocks, ())], self._course, keeps_states=True)
            ahead = Ahead(to_do=steps)
            make_targets(job, self._key, self._target_keys, stage, ahead=ahead)
            self._commit(stage, done, self._train(stage))
        learned = {
            name: each
            for key in self.keys.values()
            for name, each in read_scores(job.run, key).items()
        }
        has_gains = self._allocator.has_gains(job.budget.kept)
        facts = dict(next(iter(done.values()), {}))
        if self._allocator.adapters:
            facts |= {"adapters": self._allocator.adapters}
        if self._allocator.polarises:
            facts |= {"gains": has_gains, "reconstruction": RECONSTRUCTION}
        return Scores(
            report={"learn": facts}, learned=learned, orders=self.keys, has_gains=has_gains
        )

    def _train(self, stage: RunningStage) -> dict[str, Any]:
        """Perform the steps after the last snapshot; gives the facts of the learning."""
        job, course, monitor = self._job, self._course, stage.monitor
        mask = read_tokens(job.run, job.tokens_key).mask
        lengths = [(int(row.sum()), int((row[1:] & row[:-1]).sum())) for row in mask]
        snapshots, sizes, counts = self._left(stage)
        if not snapshots:
            # the units that it describes are about to be overwritten
            job.run.units.drop(self._progress_key)
        pipeline = LearnPipeline(
            course,
            lengths,
            self._allocator,
            self._kept,
            num_blocks=job.survey.num_blocks,
            group=job.grouping.size,
            snapshots=snapshots,
            sizes=sizes,
        )
        pipeline.counts |= counts
        tokens, begun = 0, time.monotonic()

        def on_success(call: Call, value: Any) -> None:
            nonlocal tokens
            before = len(pipeline.snapshots)
            pipeline.record_result(call, value)
            if isinstance(call.command, Turn):
                tokens += lengths[call.command.sequence][0]
            elif isinstance(call.command, UpdateScores) and call.shard == 0:
                step, speed = call.command.step, tokens / (time.monotonic() - begun)
                stage.progress(step, course.steps, unit=f"step {step}", tokens_per_second=speed)
            if len(pipeline.snapshots) > before:
                self._note(pipeline, stage)
                step, kept = pipeline.step, pipeline.sizes[pipeline.step]
                loss = pipeline.snapshots[-1].held_out
                text = f"step {step}: {kept:.4f} of the values, held-out loss {loss:.4f}"
                monitor.note(text, stage=stage.name, step=step)

        dispatch(
            stage.workers.pool,
            pipeline,
            FailurePolicy(),
            on_success=on_success,
            is_awaited=pipeline.is_awaited,
            on_event=monitor.event,
            tally=monitor.tally(),
        )
        if pipeline.stop == "diverged":
            raise InputError(
                f"learn: the loss or a gradient is not finite after step {pipeline.step}; the text "
                "or the dtype of the passes is to blame: calibrate on another text, or in float32"
            )
        return self._facts(pipeline)

    def _kept(self, counts: Counts) -> float:
        """Kept fraction of values, if the linears store what their gates leave open."""
        values = dense = 0
        for linear in self._job.linears:
            dense += linear.values
            open_directions, has_tail = counts.get(linear.name, (0, True))
            rank = max(open_directions, 1) + self._allocator.adapters
            factors = self._job.form.factor_values(linear, rank)
            values += linear.values if has_tail else min(factors, linear.values)
        return values / dense

    def _facts(self, pipeline: LearnPipeline) -> dict[str, Any]:
        """Facts of the learning, the same for two equal runs."""
        counts = pipeline.counts
        gates = sum(self._gates.values()) + len(self._gates)
        is_open = sum(directions + has_tail for directions, has_tail in counts.values())
        return {
            "steps": pipeline.step,
            "stop": pipeline.stop,
            "kept": pipeline.sizes[pipeline.step],
            "gates": gates,
            "open": is_open,
            "closed": gates - is_open,
            "emptied": [name for name in self._gates if counts.get(name, (1, True)) == (0, False)],
            "snapshots": [
                {**asdict(each), "kept": pipeline.sizes[each.step]} for each in pipeline.snapshots
            ],
        }

    @property
    def _progress_key(self) -> str:
        """Key of the unit that names the last snapshot."""
        return unit_key("snapshots", LEARN_VERSION, [self._key])

    def _left(
        self, stage: RunningStage
    ) -> tuple[list[Snapshot], dict[int, float], dict[str, tuple[int, bool]]]:
        """Snapshots of an earlier run, their sizes and the last counts, if no state is damaged."""
        units, workers, monitor = self._job.run.units, stage.workers, stage.monitor
        named = {"snapshots": self._progress_key}
        left = reusable_units(units, named, workers, monitor, stage="learning", is_all=False)
        if not left:
            return [], {}, {}
        facts = left["snapshots"]
        snapshots = [Snapshot(**each) for each in facts["snapshots"]]
        step = snapshots[-1].step
        hashes = {
            f"step {step}, block {block}": units.hashes(snapshot_key(self._key, step, block))
            for block in (self.keys if step else ())
        }
        if not all(hashes.values()) or len(verified_units(workers, monitor, hashes)) < len(hashes):
            return [], {}, {}
        monitor.note(f"learning goes on from step {step}", stage=stage.name, step=step)
        sizes = {int(step): kept for step, kept in facts["sizes"].items()}
        counts = {name: (count, has_tail) for name, (count, has_tail) in facts["counts"].items()}
        return snapshots, sizes, counts

    def _note(self, pipeline: LearnPipeline, stage: RunningStage) -> None:
        """Commit that a snapshot is complete; the states before it are removed."""
        units = self._job.run.units
        facts = {
            "snapshots": [asdict(each) for each in pipeline.snapshots],
            "sizes": {str(step): kept for step, kept in pipeline.sizes.items()},
            "counts": {name: [*each] for name, each in pipeline.counts.items()},
        }
        unit = units.begin(self._progress_key)
        unit.commit(environment=stage.workers.environment, facts=facts)
        for each in pipeline.snapshots[-2:-1]:
            self._drop(each.step)

    def _drop(self, step: int) -> None:
        for block in self.keys:
            self._job.run.units.drop(snapshot_key(self._key, step, block))

    def _commit(
        self, stage: RunningStage, done: dict[int, dict[str, Any]], facts: Mapping[str, Any]
    ) -> None:
        """Commit the scores of all blocks; then no snapshot is needed any more."""
        step, missing = facts["steps"], [block for block in self.keys if block not in done]

        def on_success(call: Call, value: Any) -> None:
            assert isinstance(call.command, CommitScores)
            done[call.command.block] = dict(facts)

        calls = [(f"block {block}, commit", CommitScores(block, step, facts)) for block in missing]
        dispatch(
            stage.workers.pool,
            IndependentCalls(calls, of="blocks"),
            FailurePolicy(),
            on_success=on_success,
            on_event=stage.monitor.event,
            tally=stage.monitor.tally(),
        )
        self._drop(step)
        self._job.run.units.drop(self._progress_key)
