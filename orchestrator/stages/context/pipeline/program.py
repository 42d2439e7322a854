"""Moves of a shard in the pipeline that trains, as a function of the cut and of the sequences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from orchestrator.models.training.train_options import Course

Kind = Literal["take", "forward", "turn", "backward", "update", "evaluate", "snapshot", "keep"]


@dataclass(frozen=True, slots=True)
class Move:
    """Call of a shard's program."""

    kind: Kind
    step: int
    """Its step, counted from 1; after the steps of a period, the last one."""
    serial: int = -1
    """Number of the pass of a sequence in the period."""
    sequence: int = -1
    is_last: bool = False
    """True if it completes the shard's gradient of the step."""


def program(
    shard: int,
    shards: int,
    batches: Sequence[tuple[int, Sequence[int]]],
    held_out: Sequence[int],
    *,
    keeps_states: bool = True,
) -> list[Move]:
    """Moves of one shard in a period: its steps, the held-out sequences, and a snapshot.

    Args:
        batches: For each step its number and its sequences; empty: only the start is evaluated.
        keeps_states: Whether a snapshot is the whole state, or the values of the blocks only.
    """
    moves: list[Move] = []
    first = 0
    is_last = shard == shards - 1
    for step, batch in batches:
        pairs = list(enumerate(batch, start=first))
        first += len(batch)
        forward = [Move("forward", step, *pair) for pair in pairs]
        kind: Kind = "turn" if is_last else "backward"
        back = [Move(kind, step, *pair, pair == pairs[-1]) for pair in pairs]
        # the last shard turns: its forward pass is part of its backward pass
        ahead = 0 if is_last else shards - 1 - shard
        later = [] if is_last else forward[ahead:]
        moves += forward[:ahead]
        for each, another in zip_longest(back, later):
            moves += [another, each] if another else [each]
        moves.append(Move("update", step))
    end = batches[-1][0] if batches else 0
    moves += [Move("evaluate", end, first + i, each) for i, each in enumerate(held_out)]
    last: Kind = "snapshot" if keeps_states else "keep"
    return [*moves, Move(last, end)] if batches else moves


def work_left(
    shards: Sequence[tuple[int, Sequence[Move]]],
    course: Course,
    planned: int = 0,
    *,
    keeps_states: bool,
) -> dict[str, float]:
    """Units of work by kind of move, each a move through one block.

    Args:
        shards: Number of blocks of each shard, and its moves that have not ended.
        planned: Number of steps that the moves include, and those before them.
        keeps_states: As for `program`.
    """
    sequences = sum(map(len, course.batches[planned:]))
    periods = -(-(course.steps - planned) // course.options.every)
    # the start is evaluated too
    is_new = planned == 0 and not any(moves for _, moves in shards)
    evaluated = len(course.held_out) * (periods + is_new)
    found: Counter[str] = Counter()
    for number, (blocks, moves) in enumerate(shards):
        for move in moves:
            found[move.kind] += blocks
        if number == len(shards) - 1:
            found["turn"] += blocks * sequences
        else:
            found["forward"] += blocks * sequences
            found["backward"] += blocks * sequences
        found["evaluate"] += blocks * evaluated
        found["update"] += blocks * (course.steps - planned)
        found["snapshot" if keeps_states else "keep"] += blocks * periods
        found["take"] += blocks * is_new
    return {kind: float(count) for kind, count in found.items()}
