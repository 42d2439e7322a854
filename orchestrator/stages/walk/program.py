"""What is done about a block that is walked, round by round: pure, without tensors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.models.training.refine_ledger import Ledger
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.replicated_blocks import FIRST, Program, Round


def walk_block(
    block: int,
    sequences: int,
    *,
    is_made: bool,
    is_changed: bool,
    compensates: bool,
    refinement: RefineOptions | None,
) -> Program:
    """The rounds of a block; gives the facts of its unit, nothing if that is there.

    Forward passes are shared out by chunks, in and out; of the training the held-out chunks and the
    slices of each step.

    Args:
        is_made: Whether its unit is committed: chunks only pass through it.
        is_changed: Whether it has a linear that is cut.
        compensates: Whether its factors are fitted again.
        refinement: How it is trained, if it is.
    """
    about = (block, is_made)
    seen = yield Round(method=FIRST, what="forward", parts=sequences, about=about)
    facts: dict[str, Any] = {}
    improved = False
    if is_changed and not is_made:
        facts["before"] = _mean(seen.values)
        if compensates:
            # every replica solves for itself: the same bits, and nothing to send
            found = yield Round(method="compensate", what="compensation")
            facts["linears"] = found.state["linears"]
        if refinement is not None:
            ledger = Ledger(sequences, refinement)
            improved = yield from _refine(ledger)
            facts["refinement"] = ledger.account().facts()
    passed = yield Round(method="leave", what="behind", parts=sequences, about=(improved,))
    if is_made:
        return None
    facts["after"] = _mean(passed.values)
    (made,) = (yield Round(method="commit", what="commit", parts=1, about=(facts,))).values
    return made


def _refine(ledger: Ledger) -> Program:
    """Epochs until the ledger says stop; whether the last state is the best one."""
    held_out = Round(method="evaluate", what="held out", parts=len(ledger.held_out))
    found = yield held_out
    ledger.evaluated(found.values)
    improved = False
    while ledger.stop is None:
        epoch = len(ledger.epochs)
        for batch in range(ledger.batches):
            found = yield Round(
                method="descend",
                what=f"epoch {epoch + 1}, step {batch + 1}",
                parts=ledger.parts(batch),
                about=(epoch, batch, improved),
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
    """The mean of chunks' values whose numbers and sums are given."""
    values = sum(number for number, _ in found)
    return sum(total for _, total in found) / max(values, 1)
