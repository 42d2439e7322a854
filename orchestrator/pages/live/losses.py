"""Losses of refinement and training, from the events of a journal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BlockLosses:
    """Losses of a block by epoch; an epoch whose loss is not finite has NaN."""

    train: tuple[float, ...]
    """Loss of each epoch, every batch before its own step."""
    held_out: tuple[float, ...]
    """Loss before the first step, then after each epoch."""
    best: int
    """Number of epochs after which the kept state was reached."""


@dataclass(frozen=True, slots=True)
class SnapshotLosses:
    """Losses of the whole model at a snapshot of its training."""

    step: int
    train: float
    """Loss since the last snapshot; NaN at the start."""
    held_out: float


@dataclass(slots=True)
class RunLosses:
    """Losses of the last run, and those of the run before it while they may be continued."""

    blocks: dict[str, dict[int, BlockLosses]] = field(default_factory=dict)
    """By stage and block."""
    snapshots: list[SnapshotLosses] = field(default_factory=list)
    """In ascending order of steps."""
    _earlier_blocks: dict[str, dict[int, BlockLosses]] = field(default_factory=dict)
    _earlier_snapshots: list[SnapshotLosses] = field(default_factory=list)

    def begin_run(self) -> None:
        """Set all losses aside: a new run continues with those that it announces."""
        # an earlier run may have ended before it announced what it reuses
        for name, found in self.blocks.items():
            self._earlier_blocks.setdefault(name, {}).update(found)
        self._earlier_snapshots = self.snapshots or self._earlier_snapshots
        self.blocks, self.snapshots = {}, []

    def take_unit(self, stage: str, block: int, losses: object) -> None:
        match losses:
            case {"train": list(train), "held_out": list(held_out), "best": int(best)}:
                found = BlockLosses(_numbers(train), _numbers(held_out), best)
                self.blocks.setdefault(stage, {})[block] = found

    def take_over(self, stage: str, blocks: Sequence[int]) -> None:
        """Continue with the losses of blocks that an earlier run has trained."""
        earlier = self._earlier_blocks.get(stage, {})
        found = {block: earlier[block] for block in blocks if block in earlier}
        if found:
            self.blocks.setdefault(stage, {}).update(found)
        if stage == "train":
            self.snapshots = self._earlier_snapshots

    def go_on_from(self, step: int) -> None:
        """Continue the training of an earlier run from a step."""
        self.snapshots = [each for each in self._earlier_snapshots if each.step <= step]

    def take_snapshot(self, event: Mapping[str, Any]) -> None:
        """Add a snapshot; after a loss of workers, steps are repeated from an earlier one."""
        match event:
            case {"step": int(step), "held_out": held_out}:
                (train, loss) = _numbers([event.get("train"), held_out])
                before = [each for each in self.snapshots if each.step < step]
                self.snapshots = [*before, SnapshotLosses(step, train, loss)]


def _numbers(values: Sequence[object]) -> tuple[float, ...]:
    return tuple(map(_number, values))


def _number(value: object) -> float:
    """Convert to a float; NaN if the value is no number, or one that no loss has."""
    is_loss = isinstance(value, int | float) and abs(value) < 2**100
    return float(value) if is_loss else math.nan  # type: ignore[arg-type]
