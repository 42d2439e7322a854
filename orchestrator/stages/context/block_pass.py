"""Passes over all blocks of a model, forward, backward or in order, which commit a unit per block.

The driver's part; the workers compute statistics and commit the units.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.models.training.refine_ledger import losses_of
from orchestrator.plan.cut import cut_segments
from orchestrator.progress.tally import Ahead
from orchestrator.readable import counted
from orchestrator.runtime.calls import Call, Finish
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy
from orchestrator.runtime.replicated_blocks import Program, ReplicatedBlocks
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.expert_group import WHOLE, ExpertGroup
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.worker.compress_worker import GatherStatistics
from orchestrator.stages.context.worker.curvature_worker import BackwardPass
from orchestrator.store.chunks import Chunks
from orchestrator.store.run import RunDirectory

LONG_LIST = 64
"""Length above which a list of floats is converted to an array."""


def with_arrays(facts: Any) -> Any:
    """Convert long lists of floats to arrays, which take a quarter of the driver's memory."""
    if isinstance(facts, dict):
        return {name: with_arrays(value) for name, value in facts.items()}
    if not isinstance(facts, list):
        return facts
    if len(facts) > LONG_LIST and all(type(value) is float for value in facts):
        return np.array(facts)
    return [with_arrays(value) for value in facts]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPass:
    """Settings shared by all passes of a run over the blocks of its model."""

    run: RunDirectory
    num_blocks: int
    sequences: int
    group: int
    """Number of blocks that are finished together."""
    blocks: int
    """Largest number of blocks of a shard if the recipe has no number of shards."""
    segments: int = 1
    """Segments of a backward pass, see `cut_segments`."""
    patience: Mapping[str, float] = field(default_factory=dict)
    """Deadlines of calls in seconds, by method of the worker (see `Deadlines`)."""
    on_committed: Callable[[int], None] = lambda block: None
    """Called with every block once its unit is committed."""
    experts: ExpertGroup = WHOLE
    """Experts whose statistics the pass gathers."""

    def forward(
        self,
        pass_key: str,
        keys: Mapping[int, str],
        stage: RunningStage,
        committed: Mapping[int, dict[str, Any]] | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Pass all chunks through the shards. Returns the facts of these units, by block.

        Reusable units are not computed again.

        Args:
            committed: Result of `committed`, if the caller has it already.
        """
        done, workers = self._done(keys, stage, committed), stage.workers
        cut = self._cut(workers)
        schedule = ShardPass(
            cut,
            todo=keys.keys() - done.keys(),
            num_chunks=self.sequences,
            present=self._present(pass_key, [blocks.start for blocks in cut], workers),
            joints=self._joints,
            about=() if self.experts == WHOLE else (GatherStatistics(self.experts),),
        )
        work = {"gather": self.sequences * self.num_blocks, "open": self.num_blocks}
        ahead = self._passes_ahead(Counter(work), self.sequences * len(cut), keys)
        self._perform(schedule, pass_key, done, keys, stage=stage, ahead=ahead)
        return done

    def backward(
        self,
        dense_key: str,
        pass_key: str,
        *,
        draws: int,
        keys: Mapping[int, str],
        stage: RunningStage,
        committed: Mapping[int, dict[str, Any]] | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Pass gradients from the last block to the first, `draws` for every sequence.

        A forward pass under `dense_key` stores chunks at the boundaries; they are kept until the
        shards that read them are complete, because the backward pass recomputes each shard from its
        input. If storage for all boundaries is too large, only some boundaries have chunks, and the
        forward pass is repeated segment by segment (see `cut_segments`). If a shard exceeds the
        memory of a worker, it is divided, and another forward pass computes the chunks at the new
        boundaries.

        Returns:
            The facts of the units of these keys, by block; `committed` as in `forward`.
        """
        done, workers = self._done(keys, stage, committed), stage.workers
        cut, count = self._cut(workers), draws * self.sequences
        dense = self.run.chunks(dense_key, workers.environment)

        def backward_pass(shards: Sequence[range]) -> ShardPass:
            """Backward pass; gradients at its end are kept if earlier blocks need them."""
            first = shards[0].start
            continues = any(block < first for block in todo)
            boundaries = [blocks.stop for blocks in shards[::-1]]
            *present, results = self._present(pass_key, [*boundaries, first], workers, count)
            return ShardPass(
                shards[::-1],
                todo=todo,
                num_chunks=count,
                present=present,
                results=results if continues else None,
                keeps=(first,) if continues else (),
                backward=True,
                joints=self._joints,
                reads_beside=True,
                about=(BackwardPass(self.experts),),
            )

        while todo := keys.keys() - done.keys():
            segments = cut_segments(len(cut), workers.size, self.segments)
            kept, first = _next_segment(cut, segments, backward_pass(cut).unfinished)
            ahead = self._gradients_ahead(cut, cut[:first], count, todo)
            new_cut = self._store_boundaries(dense_key, cut, kept, stage, ahead=ahead)
            if new_cut != cut:
                cut = new_cut
                continue
            schedule = backward_pass(cut[first:])
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
        """Process blocks in order, each after all chunks have passed the preceding one.

        Args:
            streams: Pass keys of the streams of chunks.
            keys: Unit keys of all blocks of the pass, from block 0.
            program: Function from a block, and a bool that is True if its unit is committed, to the
                rounds of the block.
            outline: Expected parts of the rounds of a block, by method.

        Returns:
            The facts of the units, by block.
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
                    # all workers take part in each block
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
        """Find the reusable units among these keys. Returns their facts, by block.

        Args:
            name: Name of their stage; None: the name of `stage`.
        """
        units, name = self.run.units, name or stage.name
        done = reusable_units(
            units, keys, stage.workers, stage.monitor, stage=name, called="block {}"
        )
        if done:
            of, are = counted(len(keys), "block"), "is" if len(done) == 1 else "are"
            text = f"{len(done)} of {of} {are} committed already"
            stage.monitor.note(text, stage=name, blocks=sorted(done))
        return done

    def _done(
        self,
        keys: Mapping[int, str],
        stage: RunningStage,
        committed: Mapping[int, dict[str, Any]] | None,
    ) -> dict[int, dict[str, Any]]:
        """Facts of the units that are not computed again, by block."""
        if committed is None:
            committed = self.committed(keys, stage)
        for block in committed:
            self.on_committed(block)
        return {block: with_arrays(facts) for block, facts in committed.items()}

    @property
    def _joints(self) -> range:
        """Blocks at which a shard may start."""
        return range(0, self.num_blocks, self.group)

    def _cut(self, workers: WorkerGroup) -> tuple[range, ...]:
        return workers.cut(self.num_blocks, blocks=self.blocks, group=self.group)

    def _present(
        self, pass_key: str, boundaries: list[int], workers: WorkerGroup, count: int | None = None
    ) -> list[set[int]]:
        """Stored chunks at each boundary, by index."""
        chunks = self.run.chunks(pass_key, workers.environment)
        return [chunks.present(boundary, count or self.sequences) for boundary in boundaries]

    def _store_boundaries(
        self,
        dense_key: str,
        cut: tuple[range, ...],
        kept: Sequence[int],
        stage: RunningStage,
        *,
        ahead: Ahead,
    ) -> tuple[range, ...]:
        """Pass chunks to these boundaries and store them there. Returns the cut after the pass."""
        workers = stage.workers
        last = next(shard for shard, blocks in enumerate(cut) if blocks.start == max(kept))
        if last == 0:
            return cut
        boundaries = [blocks.start for blocks in cut[: last + 1]]
        *present, results = self._present(dense_key, boundaries, workers)
        schedule = ShardPass(
            cut[:last],
            todo=(),
            num_chunks=self.sequences,
            present=present,
            results=results,
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

    def _passes_ahead(self, work: Counter[str], passages: int, keys: Collection[int]) -> Ahead:
        """Work of the passes of later expert groups.

        Args:
            work: Units of one pass by kind, but for the blocks that it finishes.
            passages: Chunks that pass a shard in one pass.
        """
        later = self.experts.count - self.experts.place - 1
        to_do = work + Counter(finish=len(keys))
        return Ahead(
            to_do={kind: later * each for kind, each in to_do.items()} if later else {},
            count=later * passages,
        )

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
        """Execute a pass, and add the facts of each finished block to `done`."""
        workers = stage.workers

        def on_success(call: Call, value: Any) -> None:
            if isinstance(call.command, Finish):
                block = call.command.block
                done[block] = with_arrays(value)
                where = workers.location(call.worker)
                self._progress(block, done, keys, stage, where=where)
                self.on_committed(block)

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
        *,
        where: Mapping[str, Any] = {},
    ) -> None:
        """Report a committed block.

        Args:
            where: Location of the worker, if one alone processed the block.
        """
        seconds, size = done[block]["timings"]["seconds"], self.run.units.size(keys[block])
        trained = done[block].get("refinement", done[block])
        about = {"block": block, "seconds": seconds, "bytes": size, **where} | (
            {"losses": losses_of(trained)} if "epochs" in trained else {}
        )
        part = "" if self.experts == WHOLE else f", experts {self.experts.place + 1}"
        part += f" of {self.experts.count}" if part else ""
        stage.progress(len(done), len(keys), unit=f"block {block}{part}", **about)


def _next_segment(
    cut: Sequence[range], segments: Sequence[range], unfinished: Sequence[range]
) -> tuple[list[int], int]:
    """Find the boundaries whose chunks the next segment's backward pass needs, and its first shard.

    The next segment is the last one with an unfinished shard. Chunks are needed at the starts of
    its unfinished shards, and, for later segments, at the starts of the unfinished ones before it.
    """
    remaining = [
        (segment.start, starts)
        for segment in segments
        if (starts := [cut[shard].start for shard in segment if cut[shard] in unfinished])
    ]
    first, starts = remaining[-1]
    return [*(cut[start].start for start, _ in remaining[:-1]), *starts], first
