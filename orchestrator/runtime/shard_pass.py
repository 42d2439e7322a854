"""Chunks through shards: which worker does what next, as pure state.

Rules of a pass, asserted by the tests:

- A shard with blocks to commit takes every chunk in order, and only then finishes its blocks one
  by one. A shard that only passes chunks on takes just those that are missing behind it.
- The first shard that nobody holds is taken by a free worker, so a shard's upstream is always held
  or done, unless its worker was lost. Of several free workers one takes it that is where the
  shard's chunks are made, or where they were made last.
- A worker that waits for chunks while an earlier shard is held by nobody gives up its own shard
  and takes the earlier one, so a pass goes on with any number of workers above zero.
- A worker that opens a shard is told which one it is likely to take next, to read ahead.
- A chunk is handed over only if somebody holds the next shard; else its file is enough.
- A chunk behind a shard is computed once; a shard that is run again adds only what is missing.
- A shard that was too much for a worker's memory is cut into its smallest parts, and so is every
  other one that nobody holds and that is not done. Of their inner boundaries chunks are missing,
  as behind any shard that is run again.
- A pass that reads another's chunks beside its own cannot make those: it starts nothing more, and
  ends once nothing runs. What has its unit by then, and the chunks that lie there, stay.
- The other pass's chunks before a shard are spent once that shard is done.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from orchestrator.runtime.calls import Call, Finish, Open, Step


@dataclass(slots=True)
class ShardState:
    """One shard of a pass."""

    blocks: range
    todo: tuple[int, ...]
    """Blocks whose unit is not committed yet."""
    owner: int | None = None
    opened: bool = False
    busy: bool = False
    fed: set[int] = field(default_factory=set)
    """Chunks that went through since the owner opened the shard."""
    node: str | None = None
    """Where it is held, or was held last: what it has emitted is there in memory, or cached."""
    backward: bool = False
    """Whether chunks go through it from its last block to its first."""

    @property
    def entry(self) -> int:
        """The boundary at which chunks come, by the block that it is the input of."""
        return self.blocks.stop if self.backward else self.blocks.start

    @property
    def exit(self) -> int:
        """The boundary at which they go."""
        return self.blocks.start if self.backward else self.blocks.stop

    @property
    def label(self) -> str:
        first, last = self.blocks[0], self.blocks[-1]
        return f"block {first}" if first == last else f"blocks {first}-{last}"


class ShardPass:
    """Chunks flowing through contiguous shards.

    Args:
        cut: The shards' blocks, contiguous and in the order in which chunks pass: from the first
            block on, or, of a backward pass, from the last one on.
        todo: Blocks whose unit must be committed.
        num_chunks: Chunks of the pass.
        present: For each shard the chunks that are at its input already; what is past the last
            shard is `results`.
        results: Chunks whose result behind the last shard is there; nothing when the pass wants
            no results (a calibration).
        backward: Whether chunks are gradients, that enter a shard behind its last block.
        keeps: Boundaries whose chunks a later pass reads, by the block that they are the input of.
            `results` decides for the last boundary.
        joints: Boundaries at which shards may be cut further, should one be too much for a worker.
        reads_beside: Whether shards read chunks of another pass at their boundaries too. Where one
            is missing, or shards are to be cut further, the pass breaks off.
        about: What else a worker is told when it opens a shard.
    """

    def __init__(
        self,
        cut: Sequence[range],
        *,
        todo: Iterable[int],
        num_chunks: int,
        present: Sequence[set[int]],
        results: set[int] | None = None,
        backward: bool = False,
        keeps: Collection[int] = (),
        joints: Iterable[int] = (),
        reads_beside: bool = False,
        about: tuple[Any, ...] = (),
    ) -> None:
        wanted = set(todo)
        everything = set(range(num_chunks))
        self.num_chunks = num_chunks
        self._about = about
        self.shards = [
            ShardState(
                blocks=blocks, todo=tuple(b for b in blocks if b in wanted), backward=backward
            )
            for blocks in cut
        ]
        # chunks at boundary k are the input of shard k; the model's input is always there
        behind = everything if results is None else set(results)
        self._present = [everything, *(set(chunks) for chunks in present[1:]), behind]
        self._wants_results = results is not None
        self.keeps = frozenset(keeps)
        self._joints = sorted(set(joints))
        self._reads_beside = reads_beside
        self._spent_beside: set[int] = set()
        self.broken_off = False
        """Whether it ended before its end, since chunks of the other pass have to be made first."""
        self._was_too_much = False
        self._needed = self._needs()

    def _needs(self) -> list[set[int]]:
        """For each boundary the chunks that must come to be there, from the last one backwards."""
        everything = set(range(self.num_chunks))
        needed: list[set[int]] = [set() for _ in range(len(self.shards) + 1)]
        needed[-1] = everything if self._wants_results else set()
        for k in reversed(range(len(self.shards))):
            missing_behind = needed[k + 1] - self._present[k + 1]
            wants_all = self.shards[k].todo or (k > 0 and self.boundary(k) in self.keeps)
            needed[k] = everything if wants_all else missing_behind
        return needed

    @property
    def cut(self) -> list[range]:
        """The shards' blocks, as they are now."""
        return [state.blocks for state in self.shards]

    def is_done(self, shard: int) -> bool:
        return not self.shards[shard].todo and self._needed[shard + 1] <= self._present[shard + 1]

    @property
    def finished(self) -> bool:
        if self.broken_off:
            return not any(state.busy for state in self.shards)
        return all(self.is_done(k) for k in range(len(self.shards)))

    def boundary(self, shard: int) -> int:
        """The boundary's name: the block that it is the input of."""
        return self.shards[shard].entry if shard < len(self.shards) else self.shards[-1].exit

    @property
    def max_workers(self) -> int:
        return sum(not self.is_done(k) for k in range(len(self.shards)))

    def drop_inputs(self) -> list[int]:
        """Boundaries whose chunks will not be read again; they count as gone from here on."""
        spent = [
            k
            for k in range(1, len(self.shards))
            if self.is_done(k) and self._present[k] and self.boundary(k) not in self.keeps
        ]
        for k in spent:
            self._present[k] = set()
        self._needed = self._needs()
        return [self.boundary(k) for k in spent]

    def drop_beside(self) -> list[int]:
        """Boundaries at which the other pass's chunks are spent; each is returned once."""
        if not self._reads_beside:
            return []
        spent = {
            state.blocks.start
            for k, state in enumerate(self.shards)
            if state.blocks.start and self.is_done(k)
        }
        fresh = sorted(spent - self._spent_beside)
        self._spent_beside |= spent
        return fresh

    @property
    def unfinished(self) -> list[range]:
        """Blocks of the unfinished shards, in the order in which chunks pass."""
        return [state.blocks for k, state in enumerate(self.shards) if not self.is_done(k)]

    def is_awaited(self, chunk: tuple[int, int], window: int) -> bool:
        """Whether a worker will take this chunk among its next `window` ones."""
        boundary, index = chunk
        for k, state in enumerate(self.shards):
            if state.entry == boundary and state.owner is not None:
                following = self._next_chunk(k)
                return following is not None and following <= index < following + window
        return False

    def _next_chunk(self, shard: int, without: int | None = None) -> int | None:
        state = self.shards[shard]
        if state.todo:
            waiting = set(range(self.num_chunks)) - state.fed
        else:
            # also what went through already, if it was lost behind the shard
            waiting = self._needed[shard + 1] - self._present[shard + 1]
        return min(waiting - {without}, default=None)

    def calls(self, idle: Sequence[int], nodes: Mapping[int, str] = {}) -> list[Call]:
        if self.broken_off:
            return []
        held = {state.owner: k for k, state in enumerate(self.shards) if state.owner is not None}
        calls, starved = [], []
        free = [worker for worker in idle if worker not in held]
        for worker in idle:
            if worker in held:
                call = self._call(worker, held[worker])
                if call is not None:
                    calls.append(call)
                elif self.is_done(held[worker]):
                    self._release(held[worker])
                    free.append(worker)
                else:
                    starved.append(worker)
        free.sort()
        while free and (shard := self._first_unheld()) is not None:
            worker = self._nearest(shard, free, nodes)
            free.remove(worker)
            if (call := self._take(worker, shard, nodes)) is not None:
                calls.append(call)
        for worker in sorted(starved, key=lambda w: -held[w]):
            earlier = self._first_unheld()
            if earlier is not None and earlier < held[worker]:
                self._release(held[worker])
                call = self._take(worker, earlier, nodes)
                if call is not None:
                    calls.append(call)
        return [self._with_ahead(call) for call in calls]

    def _with_ahead(self, call: Call) -> Call:
        """Add to a call that opens a shard the blocks that its worker is likely to hold next.

        The first shards of a pass are done first, and their workers take the first free ones.
        """
        if not isinstance(call.command, Open):
            return call
        held = [k for k, state in enumerate(self.shards) if state.owner is not None]
        following = [k for k in range(call.shard, len(self.shards)) if self.shards[k].owner is None]
        place = held.index(call.shard)
        if place >= len(following):
            return call
        blocks = self.shards[following[place]].blocks
        return replace(call, command=replace(call.command, ahead=(blocks.start, blocks.stop)))

    def _first_unheld(self) -> int | None:
        for k, state in enumerate(self.shards):
            if state.owner is None and not self.is_done(k):
                return k
        return None

    def _nearest(self, shard: int, free: Sequence[int], nodes: Mapping[int, str]) -> int:
        """The first of the workers that are where the shard's input is made; else the first."""
        upstream = self.shards[shard - 1].node if shard else self.shards[shard].node
        return min(free, key=lambda worker: nodes.get(worker) != upstream)

    def _take(self, worker: int, shard: int, nodes: Mapping[int, str]) -> Call | None:
        state = self.shards[shard]
        state.owner, state.node = worker, nodes.get(worker)
        return self._call(worker, shard)

    def _call(self, worker: int, shard: int) -> Call | None:
        state = self.shards[shard]
        if state.busy or self.is_done(shard):
            return None
        if not state.opened:
            blocks = (state.blocks.start, state.blocks.stop)
            opening = Open(blocks, state.todo, about=self._about)
            return self._start(Call(worker, opening, f"{state.label}, open", shard))
        index = self._next_chunk(shard)
        if index is not None:
            return self._step(worker, shard, index)
        block = state.todo[0]
        return self._start(Call(worker, Finish(block), f"block {block}, finish", shard))

    def _step(self, worker: int, shard: int, index: int) -> Call | None:
        if index not in self._present[shard]:
            return None
        state = self.shards[shard]
        emit = index in self._needed[shard + 1] and index not in self._present[shard + 1]
        following = self.shards[shard + 1 : shard + 2]
        hand_over = emit and any(each.owner is not None for each in following)
        next_index = self._next_chunk(shard, without=index)
        return self._start(
            Call(
                worker,
                Step(index, emit, hand_over, next_index),
                f"{state.label}, chunk {index}",
                shard,
                takes=(state.entry, index),
                emits=(state.exit, index) if emit else None,
            )
        )

    def _start(self, call: Call) -> Call:
        self.shards[call.shard].busy = True
        return call

    def is_holding(self, worker: int) -> bool:
        return self._held(worker) is not None

    def _held(self, worker: int) -> int | None:
        """The shard of a worker. What a call says of it may be old: cuts shift the numbers."""
        owners = (k for k, state in enumerate(self.shards) if state.owner == worker)
        return next(owners, None)

    def succeeded(self, call: Call) -> None:
        shard = self._held(call.worker)
        assert shard is not None
        state = self.shards[shard]
        state.busy = False
        match call.command:
            case Open():
                state.opened = True
            case Step(index=index):
                state.fed.add(index)
                if call.emits is not None:
                    self._present[shard + 1].add(call.emits[1])
            case Finish(block=done):
                state.todo = tuple(block for block in state.todo if block != done)
                self._needed = self._needs()
        if self.is_done(shard):
            self._release(shard)

    def lost(self, call: Call) -> None:
        self.retired(call.worker)

    def retired(self, worker: int) -> None:
        shard = self._held(worker)
        if shard is not None:
            self._release(shard)

    def shrink_after_oom(self, call: Call) -> bool:
        shard = self._held(call.worker)
        if shard is None or not self._inner(self.shards[shard]):
            return False
        self._release(shard)
        if self._reads_beside:
            self.broken_off = self._was_too_much = True
            return True
        for k in reversed(range(len(self.shards))):
            if self.shards[k].owner is None and not self.is_done(k):
                self._cut(k)
        self._needed = self._needs()
        return True

    def following_cut(self) -> tuple[range, ...]:
        """What to go on with after breaking off: where a shard was too much, the smallest parts."""
        parts: list[range] = []
        for k, state in enumerate(self.shards):
            is_cut = self._was_too_much and not self.is_done(k)
            edges = self._inner(state) if is_cut else []
            pairs = pairwise([state.blocks.start, *edges, state.blocks.stop])
            parts += [range(start, stop) for start, stop in pairs]
        return tuple(sorted(parts, key=lambda blocks: blocks.start))

    def _inner(self, state: ShardState) -> list[int]:
        """Boundaries within a shard at which it may be cut."""
        return [b for b in self._joints if state.blocks.start < b < state.blocks.stop]

    def _cut(self, shard: int) -> None:
        """Puts the smallest parts of a shard in its place, with no chunks between them."""
        state = self.shards[shard]
        inner = self._inner(state)
        edges = [state.blocks.start, *inner, state.blocks.stop]
        parts = [
            ShardState(
                blocks=range(start, stop),
                todo=tuple(block for block in state.todo if start <= block < stop),
                backward=state.backward,
            )
            for start, stop in pairwise(edges)
        ]
        self.shards[shard : shard + 1] = parts[::-1] if state.backward else parts
        self._present[shard + 1 : shard + 1] = [set() for _ in inner]

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        shard = self._held(call.worker)
        assert shard is not None
        self._release(shard)
        if chunk == call.takes:
            self._present[shard].discard(chunk[1])
            self._needed = self._needs()
        else:
            self.broken_off = True

    def _release(self, shard: int) -> None:
        state = self.shards[shard]
        state.owner, state.opened, state.busy, state.fed = None, False, False, set()
