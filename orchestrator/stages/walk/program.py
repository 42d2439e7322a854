"""Rounds of a block that is walked: pure, without tensors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.models.training.refine_ledger import Ledger
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.replicated_blocks import Program, Round
from orchestrator.stages.walk.commands import (
    CommitBlock,
    Compensate,
    Descend,
    EvaluateHeldOut,
    Leave,
    Look,
)


def walk_block(
    block: int,
    sequences: int,
    *,
    is_made: bool,
    is_changed: bool,
    compensates: bool,
    refinement: RefineOptions | None,
) -> Program:
    """Yield the rounds of a block. Returns the facts of its unit; None if it is committed already.

    Replicas share the chunks of the forward passes, the held-out chunks of the training, and the
    slices of each step.

    Args:
        is_made: Whether its unit is committed, so that chunks only pass through it.
        is_changed: Whether it has a linear that is cut.
        compensates: Whether its factors are fitted again.
        refinement: Options of its training; None: it is not trained.
    """
    look = Look(block=block, is_made=is_made)
    seen = yield Round(command=look, what="forward", parts=sequences)
    facts: dict[str, Any] = {}
    improved = False
    if is_changed and not is_made:
        facts["before"] = _mean(seen.values)
        if compensates:
            # each replica solves it: the bits are the same, and no record is sent
            found = yield Round(command=Compensate(), what="compensation")
            facts["linears"] = found.state["linears"]
        if refinement is not None:
            ledger = Ledger(sequences, refinement)
            improved = yield from _refine(ledger)
            facts["refinement"] = ledger.account().facts()
    passed = yield Round(command=Leave(keep=improved), what="behind", parts=sequences)
    if is_made:
        return None
    facts["after"] = _mean(passed.values)
    (made,) = (yield Round(command=CommitBlock(facts=facts), what="commit", parts=1)).values
    return made


def _refine(ledger: Ledger) -> Program:
    """Yield epochs until the ledger stops. Returns whether the last state is the best one."""
    held_out = Round(command=EvaluateHeldOut(), what="held out", parts=len(ledger.held_out))
    found = yield held_out
    ledger.evaluated(found.values)
    improved = False
    while ledger.stop is None:
        epoch = len(ledger.epochs)
        for batch in range(ledger.batches):
            found = yield Round(
                command=Descend(epoch=epoch, batch=batch, keep=improved),
                what=f"epoch {epoch + 1}, step {batch + 1}",
                parts=ledger.parts(batch),
                merges=True,
            )
            improved = False
            if batch:
                ledger.stepped(found.state["norm"])
            losses = [loss for each, _ in found.values for loss in each]
            ledger.summed(losses, found.values[0][1])
        found = yield replace(held_out, what=f"epoch {epoch + 1}, held out")
        ledger.stepped(found.state["norm"])
        improved = ledger.evaluated(found.values)
    return improved


def _mean(found: Sequence[tuple[int, float]]) -> float:
    """Mean of values, given the number and the sum of those of each chunk."""
    values = sum(number for number, _ in found)
    return sum(total for _, total in found) / max(values, 1)
