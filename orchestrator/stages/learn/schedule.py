"""Schedule of the learning: the pipeline with an L1 term, until open gates store little enough."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.models.training.train_options import Course, TrainOptions, plan_steps
from orchestrator.randomness import Randomness
from orchestrator.runtime.calls import Call, Command
from orchestrator.stages.context.pipeline.commands import SaveSnapshot, TakeShard
from orchestrator.stages.context.pipeline.schedule import Pipeline
from orchestrator.stages.context.pipeline.snapshot import Snapshot, Stop
from orchestrator.stages.learn.commands import UpdateScores

Counts = Mapping[str, tuple[int, bool]]
"""Number of open directions of each linear, and True if its tail is open."""


def plan_learning(allocator: GateAllocator, sequences: int, randomness: Randomness) -> Course:
    """Plan the steps, at most `steps`: a constant rate, no decay and no clipping.

    Raises:
        ValueError: Fewer than two sequences.
    """
    options = TrainOptions(
        learning_rate=allocator.rate,
        weight_decay=0.0,
        warm_up=0.0,
        floor=1.0,
        clip=1e12,
        cross_entropy=allocator.cross_entropy,
        divergence=allocator.divergence,
        held_out=allocator.held_out,
        every=allocator.every,
    )
    size, steps = allocator.batch, allocator.steps
    return plan_steps(options, sequences, randomness, size=size, steps=steps)


class LearnPipeline(Pipeline):
    """Pipeline whose steps are those of scores, and which ends by the size of the open gates.

    Weights of terms follow from the number of the step and, of polarised gates, from the kept
    fraction before it; sizes from counts of gates. No cut of the model changes either.

    Args:
        kept: Returns the kept fraction of counts of open gates.
        sizes: Kept fractions at snapshots of an earlier run, by step.
    """

    def __init__(
        self,
        course: Course,
        lengths: Sequence[tuple[int, int]],
        allocator: GateAllocator,
        kept: Callable[[Counts], float],
        *,
        num_blocks: int,
        group: int = 1,
        snapshots: Sequence[Snapshot] = (),
        sizes: Mapping[int, float] = {},
    ) -> None:
        self._allocator, self._kept = allocator, kept
        self.sizes = {0: 1.0, **sizes}
        self.counts: dict[str, tuple[int, bool]] = {}
        self._parts: dict[int, dict[str, float]] = {}
        super().__init__(course, lengths, num_blocks=num_blocks, group=group, snapshots=snapshots)

    @property
    def stop(self) -> Stop | None:
        if self.diverged:
            return "diverged"
        if not self.snapshots:
            return None
        if self._allocator.ends_at(self.sizes[self.step]):
            return "size"
        return "end" if self.step == self._course.steps else None

    @property
    def _expected_course(self) -> Course:
        return self._course.first(max(self._allocator.expected_steps, self._planned_steps))

    def _update(self, step: int, norm: float) -> Command:
        """Command of a step; gradients are not clipped."""
        # exact, so that the order of the linears does not matter
        kept = (
            math.fsum(self._parts[step - 1].values())
            if self._allocator.gates == "polarised"
            else 1.0
        )
        rate = self._course.rate(step - 1)
        return UpdateScores(step, rate, *self._allocator.weights_at(step, kept))

    def record_result(self, call: Call, value: Any) -> None:
        """Record the result of a successful call: also counts of open gates at a snapshot, and
        parts of the kept fraction after a step, which a later step of another shard keeps."""
        if isinstance(call.command, UpdateScores | TakeShard) and self._counts(call):
            step = call.command.step
            self._parts.setdefault(step, {}).update(value["sizes"])
            self._parts.pop(step - 2, None)
        if isinstance(call.command, SaveSnapshot) and self._counts(call):
            self.counts |= value["counts"]
            self.sizes[call.command.step] = self._kept(self.counts)
        super().record_result(call, value)
