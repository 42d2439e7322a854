"""Schedule of the learning: the pipeline with an L1 term, until open gates store little enough."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.allocate.scored import GateAllocator
from orchestrator.models.training.train_options import Course, TrainOptions, plan_steps
from orchestrator.randomness import Randomness
from orchestrator.runtime.calls import Call, Command
from orchestrator.stages.context.pipeline.commands import SaveSnapshot
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

    The weight of the L1 term follows from the number of the step alone, and sizes from counts of
    gates, which no cut of the model changes.

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
        super().__init__(course, lengths, num_blocks=num_blocks, group=group, snapshots=snapshots)

    @property
    def stop(self) -> Stop | None:
        if self.diverged:
            return "diverged"
        if not self.snapshots:
            return None
        if self.sizes[self.step] <= self._allocator.stop:
            return "size"
        return "end" if self.step == self._course.steps else None

    def _update(self, step: int, norm: float) -> Command:
        """Command of a step; gradients are not clipped."""
        return UpdateScores(step, self._course.rate(step - 1), self._allocator.penalty_at(step))

    def record_result(self, call: Call, value: Any) -> None:
        """Record the result of a successful call: also counts of open gates at a snapshot."""
        if isinstance(call.command, SaveSnapshot) and self._counts(call):
            self.counts |= value["counts"]
            self.sizes[call.command.step] = self._kept(self.counts)
        super().record_result(call, value)
