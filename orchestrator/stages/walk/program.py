"""Rounds of a block in a walk: a pure program, without tensors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.models.training.refine_ledger import Ledger
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.replicated_blocks import Program, Round
from orchestrator.stages.walk.commands import (
    CommitBlock,
    Compensate,
    ComputeGradients,
    EvaluateHeldOut,
    ForwardCompressed,
    ForwardDense,
)


def walk_block(
    block: int,
    sequences: int,
    *,
    is_committed: bool,
    is_changed: bool,
    compensates: bool,
    refinement: RefineOptions | None,
    on_epoch: Callable[[Ledger], None] = lambda ledger: None,
) -> Program:
    """Yield the rounds of a block. Returns the facts of its unit; None if it is committed already.

    Replicas share the chunks of the forward passes, the held-out chunks of the training, and the
    slices of each step.

    Args:
        is_committed: True if its unit is committed, so that chunks only pass through it.
        is_changed: True if it has a linear that is cut.
        compensates: True if its factors are refitted.
        refinement: Options of its training; None: it is not trained.
        on_epoch: Called after each epoch with the losses so far.
    """
    command = ForwardDense(block=block, is_committed=is_committed)
    dense = yield Round(command=command, what="dense forward pass", parts=sequences)
    facts: dict[str, Any] = {}
    improved = False
    if is_changed and not is_committed:
        facts["before"] = _mean(dense.values)
        if compensates:
            # every replica solves it to the same bits, which takes no transfer
            found = yield Round(command=Compensate(), what="compensation")
            facts["linears"] = found.state["linears"]
        if refinement is not None:
            ledger = Ledger(sequences, refinement)
            improved = yield from _refine(ledger, on_epoch)
            facts["refinement"] = ledger.account().facts()
    compressed = yield Round(
        command=ForwardCompressed(keep=improved), what="compressed forward pass", parts=sequences
    )
    if is_committed:
        return None
    facts["after"] = _mean(compressed.values)
    (stored,) = (yield Round(command=CommitBlock(facts=facts), what="commit", parts=1)).values
    return stored


def _refine(ledger: Ledger, on_epoch: Callable[[Ledger], None]) -> Program:
    """Yield epochs until the ledger stops. Returns True if the last state is the best one."""
    held_out = Round(command=EvaluateHeldOut(), what="held out", parts=len(ledger.held_out))
    found = yield held_out
    ledger.evaluated(found.values)
    improved = False
    while ledger.stop is None:
        epoch = len(ledger.epochs)
        for batch in range(ledger.batches):
            found = yield Round(
                command=ComputeGradients(epoch=epoch, batch=batch, keep=improved),
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
        on_epoch(ledger)
    return improved


def _mean(found: Sequence[tuple[int, float]]) -> float:
    """Mean of values, given the number and the sum of those of each chunk."""
    values = sum(number for number, _ in found)
    return sum(total for _, total in found) / max(values, 1)
