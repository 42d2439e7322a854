"""Blocks in order, one at a time: the schedule of what cannot be done side by side."""

from collections.abc import Iterable, Sequence

from orchestrator.cluster.schedule import Call


class Chain:
    """Blocks that are made one after the other, each from what the one before has left.

    `walk` makes a block, `follow` goes through one that is made already; either leaves what the
    next block starts from. It begins at the last boundary where that still lies, before the first
    block to make, and ends behind the last one. The worker that did a block does the next if it
    can: it holds already what that starts from.

    Args:
        todo: Blocks to make.
        present: Blocks whose input lies there in full; that of block 0 always does.
    """

    def __init__(self, *, todo: Iterable[int], present: Iterable[int]) -> None:
        self._todo = set(todo)
        first = min(self._todo, default=0)
        self._block = max(block for block in (0, *present) if block <= first)
        self._running = False
        self._last: int | None = None

    @property
    def finished(self) -> bool:
        return not self._todo

    def calls(self, idle: Sequence[int]) -> list[Call]:
        if self._running or self.finished or not idle:
            return []
        worker = self._last if self._last in idle else min(idle)
        assert worker is not None
        self._running = True
        method = "walk" if self._block in self._todo else "follow"
        return [Call(worker, method, (self._block,), f"block {self._block}")]

    def succeeded(self, call: Call) -> None:
        self._running, self._last = False, call.worker
        self._todo.discard(self._block)
        self._block += 1

    def lost(self, call: Call) -> None:
        self._running = False

    def missing(self, call: Call) -> None:
        """What the block starts from is gone: from the model's input again."""
        self._running, self._block = False, 0
