"""Schedule of chunks that pass through shards, as pure state.

Rules of a pass, asserted by the tests:

- A shard with blocks to commit takes every chunk in order, and then finishes its blocks one by one.
  A shard without such blocks takes only the chunks that are missing at its output.
- The first free shard is taken by a free worker, so that the shards before a held one are held or
  done, unless a worker was lost. Of several free workers, one on the node that makes the shard's
  chunks takes it, or that made them last.
- A worker that waits for chunks while an earlier shard is free gives up its own shard and takes the
  earlier one, so that any number of workers above zero completes a pass.
- A worker that opens a shard is told which one it is likely to take next, to read it ahead.
- A chunk is handed over only if the next shard is held; otherwise its file is enough.
- The output of a shard is computed once; a shard that is run again adds only missing chunks.
- A shard that ran out of memory is cut into its smallest parts, and so is every other shard that is
  free and not done. Chunks at the new boundaries are missing, as after a shard that is run again.
- A pass that reads another pass's chunks cannot make those: if one is missing, it starts no further
  call and ends once no call runs. Units that are committed by then stay, and so do its chunks.
- Chunks of the other pass at a shard's input are released once the shard is done.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from orchestrator.progress.tally import Counted
from orchestrator.runtime.calls import Call, Finish, Open, Step
from orchestrator.runtime.shard_state import ShardState


class ShardPass:
    """Chunks that pass through contiguous shards.

    Args:
        cut: Blocks of the shards, contiguous and in the order in which chunks pass: from the first
            block on, or from the last one on in a backward pass.
        todo: Blocks whose unit is to be committed.
        num_chunks: Number of chunks.
        present: For each shard, the chunks that are stored at its input; the first entry is unused,
            because the input of the model is always there.
        results: Chunks whose result after the last shard exists; None: the pass needs no results
            (a calibration).
        backward: Whether chunks are gradients, which enter a shard after its last block.
        keeps: Boundaries whose chunks a later pass reads, named by the block that they are the
            input of. `results` decides for the last boundary.
        joints: Boundaries at which shards may be cut further if one exceeds a worker's memory.
        reads_beside: Whether shards also read chunks of another pass at their boundaries. If one is
            missing, or shards have to be cut further, the pass breaks off.
        about: `Open.about` of the pass.
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
        # chunks at boundary k are the input of shard k; the model's input always exists
        behind = everything if results is None else set(results)
        self._present = [everything, *(set(chunks) for chunks in present[1:]), behind]
        self._wants_results = results is not None
        self.keeps = frozenset(keeps)
        self._joints = sorted(set(joints))
        self._reads_beside = reads_beside
        self._spent_beside: set[int] = set()
        self.broken_off = False
        """True if the pass ended early, because chunks of the other pass have to be made first."""
        self._was_too_much = False
        self._needed = self._needs()

    def _needs(self) -> list[set[int]]:
        """Chunks that are needed at each boundary, derived from the last boundary backwards."""
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
        """Blocks of the shards after all cuts so far."""
        return [state.blocks for state in self.shards]

    def is_done(self, shard: int) -> bool:
        return not self.shards[shard].todo and self._needed[shard + 1] <= self._present[shard + 1]

    @property
    def finished(self) -> bool:
        if self.broken_off:
            return not any(state.busy for state in self.shards)
        return all(self.is_done(k) for k in range(len(self.shards)))

    def boundary(self, shard: int) -> int:
        """Name of the input boundary of a shard, or of the last boundary."""
        return self.shards[shard].entry if shard < len(self.shards) else self.shards[-1].exit

    @property
    def max_workers(self) -> int:
        return sum(not self.is_done(k) for k in range(len(self.shards)))

    def drop_inputs(self) -> list[int]:
        """Boundaries whose chunks are not read again; they count as missing from now on."""
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
        """Boundaries at which the other pass's chunks are not read again; each is returned once."""
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
        """Blocks of the shards that are not done, in the order in which chunks pass."""
        return [state.blocks for k, state in enumerate(self.shards) if not self.is_done(k)]

    def is_awaited(self, chunk: tuple[int, int], window: int) -> bool:
        """True if this chunk is among the next `window` ones of a worker."""
        boundary, index = chunk
        for k, state in enumerate(self.shards):
            if state.entry == boundary and state.owner is not None:
                following = self._next_chunk(k)
                return following is not None and following <= index < following + window
        return False

    def _next_chunk(self, shard: int, without: int | None = None) -> int | None:
        return min(self._waiting(shard) - {without}, default=None)

    def _waiting(self, shard: int) -> set[int]:
        """Chunks that are still to pass a shard."""
        state = self.shards[shard]
        if state.todo:
            return set(range(self.num_chunks)) - state.fed
        # including chunks that have passed but whose output was lost
        return self._needed[shard + 1] - self._present[shard + 1]

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
        """First worker on the node that makes the shard's input; otherwise the first one."""
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
        """Shard that a worker holds; the number in a call may be outdated by cuts."""
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
        """Cut of the pass that continues; in smallest parts if the memory was exceeded."""
        parts: list[range] = []
        for k, state in enumerate(self.shards):
            is_cut = self._was_too_much and not self.is_done(k)
            edges = self._inner(state) if is_cut else []
            pairs = pairwise([state.blocks.start, *edges, state.blocks.stop])
            parts += [range(start, stop) for start, stop in pairs]
        return tuple(sorted(parts, key=lambda blocks: blocks.start))

    def _inner(self, state: ShardState) -> list[int]:
        """Boundaries inside a shard at which it may be cut."""
        return [b for b in self._joints if state.blocks.start < b < state.blocks.stop]

    def _cut(self, shard: int) -> None:
        """Replace a shard by its smallest parts, without chunks at the new boundaries."""
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

    def share(self, call: Call) -> tuple[str, float]:
        state = self.shards[self._held(call.worker) or 0]
        match call.command:
            case Open():
                return "open", float(len(state.blocks))
            case Step():
                return self._kind(state), float(len(state.blocks))
        return "finish", 1.0

    def _kind(self, state: ShardState) -> str:
        last = self._joints[-1] if self._joints else max(each.blocks[-1] for each in self.shards)
        has_head = last in state.blocks
        return state.kind(has_head=has_head, scores=self._wants_results)

    def to_do(self) -> dict[str, float]:
        """Openings and steps count a unit for each block of a shard, finished units one each."""
        found: Counter[str] = Counter()
        for k, state in enumerate(self.shards):
            if not self.is_done(k):
                blocks = len(state.blocks)
                found[self._kind(state)] += blocks * len(self._waiting(k))
                found["open"] += 0 if state.opened else blocks
                found["finish"] += len(state.todo)
        return {kind: float(count) for kind, count in found.items()}

    def counted(self) -> Counted:
        """Passages of chunks through shards."""
        total = self.num_chunks * len(self.shards)
        waiting = [self._waiting(k) for k in range(len(self.shards)) if not self.is_done(k)]
        return Counted(total - sum(map(len, waiting)), total, "chunks")
