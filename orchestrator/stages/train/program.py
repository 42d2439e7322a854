"""Moves of a shard in the pipeline that trains, as a function of the cut and of the sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

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
