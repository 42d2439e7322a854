"""Schedule of training over shards, one worker each: pure state, without Ray and without tensors.

Each shard has a program, a list of moves that depends only on the cut and the sequences. It makes
its moves in this order, each as soon as its input exists: first the forward passes that fill the
pipeline, then backward and forward passes alternately (1F1B), then the update; at the end of a
period the held-out sequences and a snapshot. Gradients therefore add up in the order of the
sequences, whichever shard is late.

Rules, asserted by the tests:

- A sequence passes each shard once forward and once backward in a step. On a shard, at most as
  many of them are between the two as there are shards from it to the last.
- No shard updates before all shards have reported the norm of their gradient; norms are summed
  block by block in the model's order, so that clipping does not depend on the cut.
- A period begins when the previous one has ended on all shards.
- If a worker or an input chunk is lost, all shards return to the last snapshot: calls that still
  run are awaited and their results ignored, the blocks are cut anew for the present workers, and
  each loads its shard from the snapshot. States of different lives never meet.
- Workers that come later are used from the next snapshot on. One is enough.
- Without stored states the start is the only snapshot. Shards keep their values at the best step,
  once the held-out loss is known, and their workers until the end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.models.training.train_options import Course
from orchestrator.plan.cut import cut_blocks
from orchestrator.progress.tally import Counted
from orchestrator.runtime.calls import Call, Command
from orchestrator.stages.context.pipeline.commands import (
    Backward,
    EvaluateSequence,
    Forward,
    KeepValues,
    PassCommand,
    SaveSnapshot,
    TakeShard,
    Turn,
    Update,
)
from orchestrator.stages.context.pipeline.program import Move, program, work_left
from orchestrator.stages.context.pipeline.snapshot import Snapshot, Stop

WINDOW = 4
"""Held-out sequences that wait between two shards; the program itself bounds those of steps."""
CLIP_EPSILON = 1e-6
"""Added to the norm, as `torch.nn.utils.clip_grad_norm_` does."""


@dataclass(slots=True)
class _Shard:
    blocks: range
    worker: int
    moves: list[Move]
    busy: bool = False


def _blocks(shard: _Shard) -> str:
    return f"blocks {shard.blocks.start}-{shard.blocks.stop - 1}"


class Pipeline:
    """Training course on as many shards as there are workers.

    Args:
        lengths: Tokens and predictions of each sequence, by which losses are divided.
        group: Blocks that no cut separates.
        snapshots: Measurements of an earlier run, up to its last stored snapshot.
        keeps_states: Whether shards can resume from each snapshot, or from the start only.
    """

    def __init__(
        self,
        course: Course,
        lengths: Sequence[tuple[int, int]],
        *,
        num_blocks: int,
        group: int = 1,
        snapshots: Sequence[Snapshot] = (),
        keeps_states: bool = True,
    ) -> None:
        self._course, self._lengths = course, lengths
        self._num_blocks, self._group = num_blocks, group
        self.snapshots = list(snapshots)
        self._keeps_states = keeps_states
        self.diverged = False
        self._life = 0
        self._shards: list[_Shard] = []
        self._running: set[int] = set()
        self._present: set[tuple[int, int]] = set()
        self._forget()

    def _forget(self) -> None:
        """Drop the measurements since the last snapshot."""
        self._losses: dict[int, dict[str, float]] = {}
        self._norms: dict[int, dict[int, float]] = {}

    @property
    def best(self) -> Snapshot:
        """First snapshot with the lowest held-out loss."""
        return min(self.snapshots, key=lambda each: (each.held_out, each.step))

    @property
    def stop(self) -> Stop | None:
        """Reason for the end of the training; None while it continues."""
        if self.diverged:
            return "diverged"
        if not self.snapshots:
            return None
        if self.snapshots[-1].step == self._course.steps:
            return "end"
        # while linears turn to their forms, a state that is no better is no sign of the end
        first = max(self.best.step, self._course.mixed_steps)
        since = sum(each.step > first for each in self.snapshots)
        return "patience" if since >= self._course.options.patience else None

    @property
    def finished(self) -> bool:
        return self.stop is not None

    @property
    def max_workers(self) -> int:
        return len(cut_blocks(self._num_blocks, self._num_blocks, self._group))

    @property
    def cut(self) -> list[range]:
        """Blocks of the present shards."""
        return [shard.blocks for shard in self._shards]

    @property
    def step(self) -> int:
        """Step of the last snapshot."""
        return self.snapshots[-1].step if self.snapshots else 0

    @property
    def _batches(self) -> list[tuple[int, Sequence[int]]]:
        """Steps of the period after the last snapshot; empty before the first one."""
        if not self.snapshots:
            return []
        steps = range(self.step, self._course.following(self.step))
        return [(step + 1, self._course.batches[step]) for step in steps]

    def calls(self, idle: Sequence[int], nodes: Mapping[int, str] = {}) -> list[Call]:
        if self._is_at_rest and not self._begin(sorted(idle)):
            return []
        calls = []
        for number, shard in enumerate(self._shards):
            ready = shard.moves and not shard.busy and shard.worker in idle
            if ready and (call := self._call(number, shard, shard.moves[0])) is not None:
                shard.busy = True
                self._running.add(shard.worker)
                calls.append(call)
        return calls

    @property
    def _is_at_rest(self) -> bool:
        """True if no shard has a move left."""
        return not any(shard.moves for shard in self._shards)

    def _begin(self, idle: list[int]) -> bool:
        """Start a period with the idle workers. Returns False if it cannot start yet."""
        if self._running or not idle or self.finished:
            return False
        cut = cut_blocks(self._num_blocks, len(idle), self._group)
        if list(cut) != self.cut and (self._keeps_states or not self._shards):
            self._life += 1
            pairs = zip(cut, idle, strict=False)
            self._shards = [
                _Shard(blocks, worker, [Move("take", self.step)]) for blocks, worker in pairs
            ]
        batches, held_out = self._batches, self._course.held_out
        for number, shard in enumerate(self._shards):
            shard.moves += program(
                number, len(self._shards), batches, held_out, keeps_states=self._keeps_states
            )
        self._forget()
        return True

    def _call(self, number: int, shard: _Shard, move: Move) -> Call | None:
        """Call of a shard's next move; None if its input is not there yet."""
        takes, emits = self._chunks_of(number, shard, move)
        if takes is not None and takes not in self._present:
            return None
        if move.kind == "evaluate" and emits is not None:
            waiting = sum(boundary == shard.blocks.stop for boundary, _ in self._present)
            if waiting >= WINDOW:
                return None
        if (command := self._command(shard, move)) is None:
            return None
        what = f", sequence {move.sequence}" if move.sequence >= 0 else ""
        label = f"{_blocks(shard)}, step {move.step}{what}, {move.kind}"
        return Call(shard.worker, command, label, number, takes, emits, life=self._life)

    def _chunks_of(
        self, number: int, shard: _Shard, move: Move
    ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Input and output chunk of a move; gradients lie at boundaries of negative number."""
        first, end = shard.blocks.start, shard.blocks.stop
        is_first, is_last = number == 0, number == len(self._shards) - 1
        gradients = None if is_first else (-first, move.serial)
        if move.kind == "backward":
            return (-end, move.serial), gradients
        if move.kind not in ("forward", "turn", "evaluate"):
            return None, None
        takes = None if is_first else (first, move.serial)
        if move.kind == "turn":
            return takes, gradients
        return takes, None if is_last else (end, move.serial)

    def _command(self, shard: _Shard, move: Move) -> Command | None:
        """Command of a move; None while a norm or a loss that it depends on is unknown."""
        serial, sequence, step = move.serial, move.sequence, move.step
        match move.kind:
            case "take":
                return TakeShard((shard.blocks.start, shard.blocks.stop), step)
            case "forward":
                return Forward(serial, sequence)
            case "turn":
                return Turn(serial, sequence, *self._weights(step), move.is_last)
            case "backward":
                return Backward(serial, move.is_last)
            case "evaluate":
                return EvaluateSequence(serial, sequence)
            case "update":
                if (norm := self._norm(step)) is None:
                    return None
                return self._update(step, norm)
            case "snapshot":
                return SaveSnapshot(step)
            case "keep":
                if (loss := self._held_out_loss()) is None:
                    return None
                return KeepValues(step, loss[0] < self.best.held_out)

    def _update(self, step: int, norm: float) -> Command:
        """Command of a step of the optimiser, given the norm of its gradient."""
        scale = min(1.0, self._course.options.clip / (norm + CLIP_EPSILON))
        return Update(step, scale, self._course.rate(step - 1))

    def _weights(self, step: int) -> tuple[float, float]:
        """Weights of a token's divergence and a prediction's cross-entropy in a step's loss."""
        return self._means(self._course.batches[step - 1])

    def _means(self, sequences: Sequence[int]) -> tuple[float, float]:
        options = self._course.options
        tokens = sum(self._lengths[each][0] for each in sequences)
        predictions = sum(self._lengths[each][1] for each in sequences)
        return options.divergence / max(tokens, 1), options.cross_entropy / max(predictions, 1)

    def _norm(self, step: int) -> float | None:
        """Norm of a step's gradient over all blocks; None while some are unknown."""
        found = self._norms.get(step, {})
        if len(found) < self._num_blocks:
            return None
        return math.sqrt(sum(found[block] for block in range(self._num_blocks)))

    def is_awaited(self, chunk: tuple[int, int]) -> bool:
        """True if a shard is still to read a chunk."""
        return chunk in self._present

    def is_holding(self, worker: int) -> bool:
        return any(shard.worker == worker for shard in self._shards)

    def succeeded(self, call: Call) -> None:
        self._running.discard(call.worker)
        if not self._counts(call):
            return
        shard = self._shards[call.shard]
        shard.busy = False
        shard.moves.pop(0)
        self._present.discard(call.takes or (0, -1))
        if call.emits is not None:
            self._present.add(call.emits)

    def record_result(self, call: Call, value: Any) -> None:
        """Record the result of a successful call: losses, squared norms of blocks."""
        if not self._counts(call):
            return
        found = value or {}
        if "losses" in found:
            assert isinstance(call.command, PassCommand)
            self._losses[call.command.serial] = found["losses"]
        if "norms" in found:
            step = self._begun_step(call)
            self._norms.setdefault(step, {}).update(found["norms"])
            norm = self._norm(step)
            self.diverged = norm is not None and not math.isfinite(norm)
        if self._is_at_rest and not self.diverged:
            self._conclude()

    def _begun_step(self, call: Call) -> int:
        """Step of a call that completed a gradient: that of the following update."""
        return self._shards[call.shard].moves[0].step

    def _counts(self, call: Call) -> bool:
        """True if a call is one of this life."""
        return call.life == self._life

    def _conclude(self) -> None:
        """Record the measurements of a period, whose end is the last snapshot now."""
        batches = self._batches
        trained = [sequence for _, batch in batches for sequence in batch]
        losses = [self._losses[serial] for serial in range(len(trained))]
        found = self._held_out_loss()
        assert found is not None
        loss, divergence, cross_entropy = found
        norms = [self._norm(step) or 0.0 for step, _ in batches]
        self.snapshots.append(
            Snapshot(
                step=batches[-1][0] if batches else 0,
                train=self._mean(losses, trained)[0] if batches else None,
                held_out=loss,
                divergence=divergence,
                cross_entropy=cross_entropy,
                gradient=sum(norms) / len(norms) if norms else None,
            )
        )
        self.diverged = not math.isfinite(loss)

    def _held_out_loss(self) -> tuple[float, float, float] | None:
        """Loss over the held-out sequences and its two parts; None while some are unknown."""
        first = sum(len(batch) for _, batch in self._batches)
        serials = range(first, first + len(self._course.held_out))
        if not all(serial in self._losses for serial in serials):
            return None
        return self._mean([self._losses[serial] for serial in serials], self._course.held_out)

    def _mean(
        self, losses: Sequence[dict[str, float]], sequences: Sequence[int]
    ) -> tuple[float, float, float]:
        """Loss over some sequences, and its two parts without their weights."""
        options = self._course.options
        tokens = sum(self._lengths[each][0] for each in sequences)
        predictions = sum(self._lengths[each][1] for each in sequences)
        divergence = sum(each["divergence"] for each in losses) / max(tokens, 1)
        cross_entropy = sum(each["cross_entropy"] for each in losses) / max(predictions, 1)
        loss = options.divergence * divergence + options.cross_entropy * cross_entropy
        return loss, divergence, cross_entropy

    def lost(self, call: Call) -> None:
        self._running.discard(call.worker)
        if self._counts(call):
            self._go_back()

    def retired(self, worker: int) -> None:
        if any(shard.worker == worker for shard in self._shards):
            self._go_back()

    def shrink_after_oom(self, call: Call) -> bool:
        """Return False: there is one shard per worker, so smaller ones need more workers."""
        return False

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        self.lost(call)

    def _go_back(self) -> None:
        """Return to the last snapshot; calls that still run belong to an earlier life."""
        self._life += 1
        self._shards, self._present = [], set()
        if not self._keeps_states:
            self.snapshots = []
        self._forget()

    def share(self, call: Call) -> tuple[str, float]:
        return call.method, float(len(self._shards[call.shard].blocks))

    def to_do(self) -> dict[str, float]:
        """Moves that have not ended, as if patience did not end the training early."""
        shards = [(len(each.blocks), each.moves) for each in self._shards]
        rest = shards or [(self._num_blocks, [])], self._expected_course, self._planned_steps
        return work_left(*rest, keeps_states=self._keeps_states)

    @property
    def _expected_course(self) -> Course:
        """Course of the steps that are expected, for the time left."""
        return self._course

    @property
    def _planned_steps(self) -> int:
        """Steps whose moves the shards have, and those before them."""
        begun = self.snapshots and not self._is_at_rest
        return self._course.following(self.step) if begun else self.step

    def counted(self) -> Counted:
        """Sequences of all steps."""
        planned = sum(map(len, self._course.batches[: self._planned_steps]))
        turns = sum(move.kind == "turn" for each in self._shards[-1:] for move in each.moves)
        return Counted(planned - turns, sum(map(len, self._expected_course.batches)), "sequences")
