"""Steps of gates over the shards of a pipeline, resumable, and their results: a unit a block."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.errors import InputError, UsageError
from orchestrator.models.training.train_options import Course
from orchestrator.progress.tally import Ahead
from orchestrator.runtime.calls import Call, IndependentCalls
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.verify import verified_units
from orchestrator.stages.context.decompose import block_pass
from orchestrator.stages.context.pipeline.commands import Turn
from orchestrator.stages.context.pipeline.program import work_left
from orchestrator.stages.context.pipeline.shard import snapshot_key
from orchestrator.stages.context.pipeline.snapshot import Snapshot
from orchestrator.stages.context.pipeline.targets import make_targets, target_keys
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.tokens import read_tokens
from orchestrator.stages.context.values import Decomposed
from orchestrator.stages.learn.commands import CommitScores, UpdateScores
from orchestrator.stages.learn.schedule import Counts, LearnPipeline, plan_learning
from orchestrator.store.units import unit_key

LEARN_VERSION = 1
"""Raised when a score or a gain changes."""


class GateSteps(ABC):
    """Steps of the gates of some linears, with a unit of results for each block.

    Each worker holds one shard of the model with gates, and steps pass through them
    (`LearnPipeline`). Neither workers nor losses change a bit: after a loss all return to the last
    snapshot.

    Args:
        allocator: Weights of terms, rate and number of steps.
        key: Key of the steps, by all that decides their results.
        blocks: Those with gates.
        of: Results, in the names of their units.
    """

    def __init__(
        self, job: Decomposed, allocator: GateAllocator, *, key: str, blocks: list[int], of: str
    ) -> None:
        self._job, self._allocator, self._key = job, allocator, key
        self.keys = {
            block: unit_key(f"{of} block", LEARN_VERSION, [key], block=block) for block in blocks
        }
        """Keys of the units, by block."""

    @property
    @abstractmethod
    def task(self) -> CompressionTask:
        """The task of the workers."""

    @abstractmethod
    def _kept(self, counts: Counts) -> float:
        """Kept fraction of values, if the linears store what their gates leave open."""

    @abstractmethod
    def _facts(self, pipeline: LearnPipeline) -> dict[str, Any]:
        """Facts of the steps, the same for two equal runs."""

    @cached_property
    def _course(self) -> Course:
        sequences = self._job.sequences
        if sequences < 2:
            raise UsageError(
                f"the allocation learns and there is {sequences} sequence; two are needed, one "
                "to learn on and one to hold out: give more text, or more samples"
            )
        return plan_learning(self._allocator, sequences, self._job.randomness)

    @property
    def _followed(self) -> GateAllocator:
        """Allocator whose course the steps follow."""
        return self._allocator

    @cached_property
    def _lengths(self) -> list[tuple[int, int]]:
        """Tokens of every sequence, and those of them that are predicted."""
        mask = read_tokens(self._job.run, self._job.tokens_key).mask
        return [(int(row.sum()), int((row[1:] & row[:-1]).sum())) for row in mask]

    @cached_property
    def _target_keys(self) -> tuple[str, ...]:
        return target_keys(self._job, self._course.options) if self._allocator.divergence else ()

    def committed(self, stage: RunningStage) -> dict[int, dict[str, Any]]:
        """Find the reusable units. Returns their facts, by block."""
        return block_pass(self._job, self._job.forecast).committed(self.keys, stage)

    def perform(self, stage: RunningStage, done: dict[int, dict[str, Any]]) -> None:
        """Take the steps after the last snapshot, and commit the units that are not in `done`.

        Raises:
            InputError: A loss or a gradient is not finite.
        """
        course = self._course.first(self._allocator.expected_steps)
        steps = work_left([(self._job.survey.num_blocks, ())], course, keeps_states=True)
        make_targets(self._job, self._key, self._target_keys, stage, ahead=Ahead(to_do=steps))
        self._commit(stage, done, self._train(stage))

    def _train(self, stage: RunningStage) -> dict[str, Any]:
        """Perform the steps after the last snapshot; gives the facts of the learning."""
        job, course, monitor = self._job, self._course, stage.monitor
        lengths = self._lengths
        snapshots, sizes, counts = self._left(stage)
        if not snapshots:
            # the units that it describes are about to be overwritten
            job.run.units.drop(self._progress_key)
        pipeline = LearnPipeline(
            course,
            lengths,
            self._followed,
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
                total = max(step, self._allocator.expected_steps)
                stage.progress(step, total, unit=f"step {step}", tokens_per_second=speed)
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
