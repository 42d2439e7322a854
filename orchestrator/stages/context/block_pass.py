"""Chunks through all shards, whose workers then finish their blocks: forward, or back as gradients.

The driver's part of everything that gathers statistics and commits a unit a block.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.plan.cut import cut_segments
from orchestrator.progress.tally import Ahead
from orchestrator.runtime.calls import Call, Finish
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.replicated_blocks import Program, ReplicatedBlocks
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.worker.curvature_worker import BackwardPass
from orchestrator.store.chunks import Chunks
from orchestrator.store.run import RunDirectory

LONG = 64
"""Numbers of a list that is worth an array."""


def with_arrays(facts: Any) -> Any:
    """Facts with long lists of numbers as arrays: a quarter of their memory in the driver."""
    if isinstance(facts, dict):
        return {name: with_arrays(value) for name, value in facts.items()}
    if not isinstance(facts, list):
        return facts
    if len(facts) > LONG and all(type(value) is float for value in facts):
        return np.array(facts)
    return [with_arrays(value) for value in facts]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPass:
    """Settings that all passes of a run over the model's blocks share."""

    run: RunDirectory
    num_blocks: int
    sequences: int
    group: int
    """Blocks that are finished as one."""
    blocks: int
    """The most in a shard, where the recipe does not say how many there are."""
    segments: int = 1
    """Segments of a backward pass, see `cut_segments`."""
    patience: Mapping[str, float] = field(default_factory=dict)
    """Seconds that a call may take, by method of the worker (see `Deadlines`)."""
    on_committed: Callable[[int], None] = lambda block: None
    """Called with each block whose unit is committed."""

    def forward(
        self,
        pass_key: str,
        keys: Mapping[int, str],
        stage: RunningStage,
        committed: Mapping[int, dict[str, Any]] | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Passes chunks on; gives the facts of the units of these keys, by block.

        Units that are committed, and whole, are not made again.

        Args:
            committed: Result of `committed`, if the caller has it already.
        """
        if committed is None:
            done = self._decomposed(keys, stage)
        else:
            done = {block: with_arrays(facts) for block, facts in committed.items()}
        for block in done:
            self.on_committed(block)
        workers = stage.workers
        cut = self._cut(workers)
        schedule = ShardPass(
            cut,
            todo=keys.keys() - done.keys(),
            num_chunks=self.sequences,
            present=self._present(pass_key, [blocks.start for blocks in cut], workers),
            joints=self._joints,
        )
        self._perform(schedule, pass_key, done, keys, stage=stage)
        return done

    def backward(
        self,
        dense_key: str,
        pass_key: str,
        *,
        draws: int,
        keys: Mapping[int, str],
        stage: RunningStage,
    ) -> dict[int, dict[str, Any]]:
        """The same with gradients, `draws` for every sequence, from the last block to the first.

        A forward pass under `dense_key` stores chunks at the boundaries, until the shards that read
        them are done: the backward pass runs each shard again on its input and goes back through
        it. If that takes too much storage, only some boundaries have chunks, and the forward pass
        is repeated segment by segment (see `cut_segments`). If a shard is too much for a worker,
        one more forward pass makes the chunks at the new cut.
        """
        done, workers = self._decomposed(keys, stage), stage.workers
        cut, count = self._cut(workers), draws * self.sequences
        dense = self.run.chunks(dense_key, workers.environment)

        def back(part: Sequence[range]) -> ShardPass:
            """Backward pass through these shards; gradients stay if earlier blocks need them."""
            first = part[0].start
            goes_on = any(block < first for block in todo)
            boundaries = [blocks.stop for blocks in part[::-1]]
            *present, behind = self._present(pass_key, [*boundaries, first], workers, count)
            return ShardPass(
                part[::-1],
                todo=todo,
                num_chunks=count,
                present=present,
                results=behind if goes_on else None,
                keeps=(first,) if goes_on else (),
                backward=True,
                joints=self._joints,
                reads_beside=True,
                about=(BackwardPass(),),
            )

        while todo := keys.keys() - done.keys():
            segments = cut_segments(len(cut), workers.size, self.segments)
            kept, first = _next_segment(cut, segments, back(cut).unfinished)
            ahead = self._gradients_ahead(cut, cut[:first], count, todo)
            if (found := self._keep_boundaries(dense_key, cut, kept, stage, ahead=ahead)) != cut:
                cut = found
                continue
            schedule = back(cut[first:])
            ahead = self._gradients_ahead(cut[:first], cut[:first], count, todo)
            self._perform(schedule, pass_key, done, keys, stage=stage, beside=dense, ahead=ahead)
            cut = (*cut[:first], *schedule.following_cut())
        for chunks in (dense, self.run.chunks(pass_key, workers.environment)):
            chunks.clear()
        return done

    def in_order(
        self,
        streams: Sequence[str],
        keys: Mapping[int, str],
        program: Callable[[int, bool], Program],
        stage: RunningStage,
        *,
        outline: Mapping[str, float] = {},
    ) -> dict[int, dict[str, Any]]:
        """Blocks one after the other, each from all the chunks that the one before has left.

        Args:
            streams: Pass keys of the chunks that move from block to block, side by side.
            keys: Of the units of all blocks that are gone through, from block 0 on.
            program: The rounds of a block, told whether it is made; gives the facts of its unit.
            outline: Expected parts of its rounds, by method.
        """
        done, workers = self.committed(keys, stage), stage.workers
        stores = [self.run.chunks(stream, workers.environment) for stream in streams]
        present = [
            block
            for block in keys
            if all(len(store.present(block, self.sequences)) == self.sequences for store in stores)
        ]
        schedule = ReplicatedBlocks(
            todo=keys.keys() - done.keys(), present=present, program=program, outline=outline
        )

        def note_ended() -> None:
            for block, facts in schedule.ended():
                for store in stores:
                    store.drop(block)
                if facts is not None:
                    done[block] = facts
                    self._progress(block, done, keys, stage)

        def on_success(call: Call, value: Any) -> None:
            schedule.record_result(call, value)
            note_ended()

        dispatch(
            workers.pool,
            schedule,
            FailurePolicy(),
            on_success=on_success,
            is_awaited=schedule.is_awaited,
            on_event=stage.monitor.event,
            tally=stage.monitor.tally(),
        )
        note_ended()
        for store in stores:
            store.clear()
        return done

    def committed(
        self, keys: Mapping[int, str], stage: RunningStage, name: str | None = None
    ) -> dict[int, dict[str, Any]]:
        """Facts of the units of an earlier run that are reused.

        Args:
            name: Of their stage, if it is another one.
        """
        about, name = (stage.workers, stage.monitor), name or stage.name
        done = reusable_units(self.run.units, keys, *about, stage=name, called="block {}")
        if done:
            stage.monitor.note(f"{len(done)} of {len(keys)} blocks are committed already")
        return done

    def _decomposed(
        self, keys: Mapping[int, str], stage: RunningStage
    ) -> dict[int, dict[str, Any]]:
        committed = self.committed(keys, stage)
        return {block: with_arrays(facts) for block, facts in committed.items()}

    @property
    def _joints(self) -> range:
        """Blocks at which shards may begin."""
        return range(0, self.num_blocks, self.group)

    def _cut(self, workers: WorkerGroup) -> tuple[range, ...]:
        return workers.cut(self.num_blocks, blocks=self.blocks, group=self.group)

    def _present(
        self, pass_key: str, boundaries: list[int], workers: WorkerGroup, count: int | None = None
    ) -> list[set[int]]:
        """Stored chunks at each boundary, by index."""
        chunks = self.run.chunks(pass_key, workers.environment)
        return [chunks.present(boundary, count or self.sequences) for boundary in boundaries]

    def _keep_boundaries(
        self,
        dense_key: str,
        cut: tuple[range, ...],
        kept: Sequence[int],
        stage: RunningStage,
        *,
        ahead: Ahead,
    ) -> tuple[range, ...]:
        """Passes chunks up to these boundaries and keeps them there; gives the cut afterwards."""
        workers = stage.workers
        last = next(shard for shard, blocks in enumerate(cut) if blocks.start == max(kept))
        if last == 0:
            return cut
        boundaries = [blocks.start for blocks in cut[: last + 1]]
        *present, behind = self._present(dense_key, boundaries, workers)
        schedule = ShardPass(
            cut[:last],
            todo=(),
            num_chunks=self.sequences,
            present=present,
            results=behind,
            keeps=kept,
            joints=self._joints,
        )
        chunks = self.run.chunks(dense_key, workers.environment)
        run_pass(workers, stage.monitor, schedule, chunks, ahead=ahead)
        return (*schedule.cut, *cut[last:])

    def _gradients_ahead(
        self, cut: Sequence[range], repeated: Sequence[range], count: int, todo: Collection[int]
    ) -> Ahead:
        """Work of backward passes that follow.

        Args:
            cut: Their shards.
            repeated: Shards whose forward pass is repeated.
            count: Chunks of a backward pass.
        """
        shards = [blocks for blocks in cut if any(block in blocks for block in todo)]
        to_do = Counter(forward=self.sequences * sum(map(len, repeated)))
        for blocks in shards:
            to_do["turn" if blocks.stop == self.num_blocks else "back"] += count * len(blocks)
            to_do["open"] += len(blocks)
            to_do["finish"] += sum(block in blocks for block in todo)
        passages = count * len(shards) + self.sequences * len(repeated)
        return Ahead(to_do=dict(to_do), count=passages)

    def _perform(
        self,
        schedule: ShardPass,
        pass_key: str,
        done: dict[int, dict[str, Any]],
        keys: Mapping[int, str],
        *,
        stage: RunningStage,
        beside: Chunks | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """The pass to its end, each block's facts into `done`."""

        def on_success(call: Call, value: Any) -> None:
            if isinstance(call.command, Finish):
                block = call.command.block
                done[block] = with_arrays(value)
                self._progress(block, done, keys, stage)
                self.on_committed(block)

        workers = stage.workers
        chunks = self.run.chunks(pass_key, workers.environment)
        run_pass(
            workers,
            stage.monitor,
            schedule,
            chunks,
            on_success=on_success,
            patience=self.patience,
            beside=beside,
            ahead=ahead,
        )

    def _progress(
        self,
        block: int,
        done: Mapping[int, Mapping[str, Any]],
        keys: Mapping[int, str],
        stage: RunningStage,
    ) -> None:
        """Tells of a block whose unit is committed."""
        seconds, size = done[block]["timings"]["seconds"], self.run.units.size(keys[block])
        facts = {"block": block, "seconds": seconds, "bytes": size}
        stage.progress(len(done), len(keys), unit=f"block {block}", **facts)


def _next_segment(
    cut: Sequence[range], segments: Sequence[range], unfinished: Sequence[range]
) -> tuple[list[int], int]:
    """Boundaries that must have chunks for the next segment's backward pass; its first shard.

    The next segment is the last one with an unfinished shard. Chunks are needed now at the starts
    of its unfinished shards, and later at the starts of the unfinished segments before it.
    """
    open_ones = [
        (segment.start, starts)
        for segment in segments
        if (starts := [cut[shard].start for shard in segment if cut[shard] in unfinished])
    ]
    first, starts = open_ones[-1]
    return [*(cut[start].start for start, _ in open_ones[:-1]), *starts], first
