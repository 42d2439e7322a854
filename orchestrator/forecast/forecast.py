"""A whole run, forecast: shards, memory, bytes, time and money, and whether it can be at all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.allocate.budget import share_values
from orchestrator.forecast import memory
from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.needs import Needs, needs_of
from orchestrator.forecast.rates import Machine, Rates
from orchestrator.forecast.shapes import ITEMSIZE_OF, Shapes
from orchestrator.forecast.work import (
    MASKED_SEQUENCES,
    TRIAL_SEQUENCES,
    TRIALS,
    Work,
    decomposing_block,
    forward_flops,
    passing,
    trained,
)
from orchestrator.models.refine_options import RefineOptions
from orchestrator.models.train_options import TrainOptions
from orchestrator.recipe import Recipe
from orchestrator.shards import cut_blocks, default_shards

USABLE = 0.92
"""Of a device's memory: the rest is its context, and what an allocator leaves unused."""
HOST_PROCESS = 1_500_000_000
"""Bytes of host memory of a worker before it holds anything: torch, transformers, Ray, CUDA."""
MOST_BLOCKS = 2
"""In a shard, unless the recipe cuts otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a run is to have."""

    workers: int
    machine: Machine
    memory_bytes: float | None
    """Of a worker's device, or of its share of a host without one; what the machine has, else."""
    host_bytes: float | None = None
    """Of a worker's host memory beside a device; not checked where it is not said."""
    price: float | None = None
    """Of a worker for an hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of the run."""

    name: str
    flops: float
    """Of all workers."""
    seconds: Mapping[str, float]
    """By the row of rates."""
    device: Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run takes; a value that goes to JSON."""

    model: Mapping[str, Any]
    machine: str
    workers: int
    shards: int
    blocks_a_shard: int
    waves: int
    stages: tuple[Stage, ...]
    limits: Mapping[str, float | None]
    """Bytes that a worker may take on its device and its host."""
    host: Footprint
    run_bytes: float
    """Of the run directory at its largest."""
    moved_bytes: float
    """Boundary chunks, written and read again."""
    final: Mapping[str, int]
    """Values and bytes of the result."""
    start_seconds: Mapping[str, float]
    price: float | None
    sources: tuple[str, ...]
    infeasible: tuple[str, ...]
    """What does not fit, and what would make it; nothing, and the run can be."""

    @property
    def seconds(self) -> dict[str, float]:
        return {
            row: start + sum(stage.seconds[row] for stage in self.stages)
            for row, start in self.start_seconds.items()
        }

    @property
    def peak(self) -> Stage:
        """The stage whose workers hold the most."""
        return max(self.stages, key=lambda stage: stage.device.total)

    @property
    def money(self) -> dict[str, float] | None:
        if self.price is None:
            return None
        return {r: s / 3600 * self.workers * self.price for r, s in self.seconds.items()}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "money": self.money}


def forecast(shapes: Shapes, recipe: Recipe, resources: Resources) -> Forecast:
    """What a recipe takes of a model's shapes; milliseconds.

    Raises:
        UsageError: The recipe names a method or an option that there is not.
        InfeasibleError: No plan stores as little as is asked for.
    """
    return _Forecasting(shapes, recipe, resources).forecast()


class _Forecasting:
    def __init__(self, shapes: Shapes, recipe: Recipe, resources: Resources) -> None:
        self.shapes, self.recipe, self.resources = shapes, recipe, resources
        self.needs: Needs = needs_of(recipe.method)
        self.itemsize = ITEMSIZE_OF.get(recipe.dtype, shapes.itemsize)
        self.out_itemsize = ITEMSIZE_OF.get(recipe.output_dtype, shapes.itemsize)
        self.pivoted = recipe.storage == "pivoted"
        self.tokens, self.sequences = recipe.sequence_length, recipe.samples
        self.kept = recipe.share
        self.refining = RefineOptions(**recipe.options.get("refinement", {}))
        self.training = TrainOptions(**recipe.options.get("training", {}))
        self.workers = resources.workers
        self.limit = resources.memory_bytes or resources.machine.memory_bytes
        self.blocks = self._blocks_that_fit()
        self.shards = recipe.shards or max(
            default_shards(shapes.num_blocks, self.workers, self.blocks), 1
        )
        self.shards = len(cut_blocks(shapes.num_blocks, self.shards))

    @property
    def _usable(self) -> float:
        return float("inf") if self.limit is None else USABLE * self.limit

    def _calibrating(self, blocks: int) -> Footprint:
        return memory.calibration(
            self.shapes,
            self.needs,
            blocks,
            tokens=self.tokens,
            itemsize=self.itemsize,
            pivoted=self.pivoted,
        )

    def _blocks_that_fit(self) -> int:
        """Of a shard; a run that meets the limit cuts its shards in the same way."""
        most = min(MOST_BLOCKS, self.shapes.num_blocks)
        fitting = [b for b in range(1, most + 1) if self._calibrating(b).total <= self._usable]
        return max(fitting, default=1)

    def forecast(self) -> Forecast:
        stages = [self._calibrate()]
        if self.needs.scores:
            stages.append(self._score())
        if self.recipe.compensate != "none" or self.recipe.refine == "in_order":
            stages.append(self._walk())
        if self.recipe.refine in ("blocks", "swept"):
            stages.append(self._refine())
        if self.recipe.refine == "swept":
            stages.append(self._walk("sweep"))
        if self.recipe.train != "none":
            stages.append(self._train())
        stages.append(self._write())
        rows = self.resources.machine.rows
        return Forecast(
            model=self._model(),
            machine=self.resources.machine.name,
            workers=self.workers,
            shards=self.shards,
            blocks_a_shard=-(-self.shapes.num_blocks // self.shards),
            waves=-(-self.shards // self.workers),
            stages=tuple(stages),
            limits={"device": self.limit, "host": self.resources.host_bytes},
            host=self._host(),
            run_bytes=self._run_bytes(),
            moved_bytes=2 * self._chunks() * (self.shards - 1),
            final=self._final(),
            start_seconds={rates.row: rates.start for rates in rows},
            price=self.resources.price,
            sources=tuple(dict.fromkeys(rates.source for rates in rows)),
            infeasible=tuple(self._infeasible(stages)),
        )

    def _model(self) -> dict[str, Any]:
        shapes = self.shapes
        return {
            "type": shapes.model_type,
            "blocks": shapes.num_blocks,
            "values": shapes.total_values,
            "bytes": shapes.total_values * shapes.itemsize,
            "linears": len(shapes.linears),
        }

    def _seconds(self, take: Any) -> dict[str, float]:
        """By row what a function of its rates gives."""
        return {rates.row: take(rates) for rates in self.resources.machine.rows}

    def _calibrate(self) -> Stage:
        """Shards in waves: load, pass all chunks, decompose; a wave's shards start one by one."""
        blocks = -(-self.shapes.num_blocks // self.shards)
        waves = -(-self.shards // self.workers)
        load = Work(read=float(blocks * self.shapes.block_values * self.shapes.itemsize))
        chunk = passing(self.shapes, self.needs, self.tokens, self.itemsize).times(blocks)
        state = float(self.tokens * self.shapes.hidden * self.itemsize)
        chunk += Work(write=state, network=state if self.workers > 1 else 0.0)
        finish = self._decomposing().times(blocks)
        head = Work(half=6.0 * self.tokens * self.shapes.head_values if self.needs.labels else 0.0)

        def take(rates: Rates) -> float:
            one = load.seconds(rates) + finish.seconds(rates)
            one += self.sequences * chunk.seconds(rates)
            filling = (min(self.shards, self.workers) - 1) * chunk.seconds(rates)
            return waves * one + filling + self.sequences * head.seconds(rates)

        total = chunk.times(self.sequences) + finish
        whole = self.shapes.num_blocks / blocks
        return Stage(
            name="calibrate",
            flops=whole * total.flops + self.sequences * head.flops,
            seconds=self._seconds(take),
            device=self._calibrating(blocks),
        )

    def _decomposing(self) -> Work:
        """All linears of a block."""
        return decomposing_block(self.shapes, self.needs, self.pivoted, self.out_itemsize)

    def _score(self) -> Stage:
        """Passes through models that are masked, or cut in one place."""
        forward = forward_flops(self.shapes, self.tokens) * self.shapes.num_blocks
        passes = float(MASKED_SEQUENCES)
        if self.needs.scores == "sensitivities":
            # a trial runs from the block that it cuts on: half of the model in the mean
            passes = TRIALS * TRIAL_SEQUENCES * len(self.shapes.linears) / 2
        work = Work(half=passes * forward)
        return Stage(
            name="score",
            flops=work.flops,
            seconds=self._seconds(lambda rates: work.seconds(rates) / self.workers),
            device=self._calibrating(1),
        )

    def _epoch(self) -> Work:
        return Work(single=self.sequences * trained(self.shapes, self.kept, self.tokens))

    def _refine(self) -> Stage:
        """Every block a unit, as many at a time as there are workers."""
        blocks = self.shapes.num_blocks
        waves = -(-blocks // self.workers)
        epochs = self._epoch().times(self.refining.epochs)
        chunks = 2 * self._chunks()
        one = epochs + Work(half=self.sequences * forward_flops(self.shapes, self.tokens))
        one += Work(read=chunks + self.shapes.block_values * self.shapes.itemsize)
        return Stage(
            name="refine",
            flops=blocks * one.flops,
            seconds=self._seconds(lambda rates: waves * one.seconds(rates)),
            device=self._refining(),
        )

    def _refining(self) -> Footprint:
        return memory.refinement(
            self.shapes,
            self.kept,
            tokens=self.tokens,
            sequences=self.sequences,
            itemsize=self.itemsize,
        )

    def _walk(self, name: str = "walk") -> Stage:
        """Block after block, each lent to all workers; unrefined one pass of statistics."""
        blocks, refines = self.shapes.num_blocks, self.recipe.refine in ("in_order", "swept")
        lent = min(self.workers, self.refining.slices)
        one = Work(half=3 * self.sequences * forward_flops(self.shapes, self.tokens))
        one += passing(self.shapes, self.needs, self.tokens, self.itemsize).times(self.sequences)
        if refines:
            one += self._epoch().times(self.refining.epochs)
        parameters = self.kept * sum(each.values for each in self.shapes.of_block(0))
        steps = self.refining.epochs * self.refining.batches if refines else 0
        lending = Work(network=4.0 * parameters * steps if lent > 1 else 0.0)
        solving = self._decomposing() if self.recipe.compensate != "none" else Work()

        def take(rates: Rates) -> float:
            shared = one.seconds(rates) / lent
            return blocks * (shared + lending.seconds(rates) + solving.seconds(rates))

        return Stage(
            name=name,
            flops=blocks * (one.flops + solving.flops),
            seconds=self._seconds(take),
            device=max(
                [self._refining(), self._calibrating(1)], key=lambda footprint: footprint.total
            ),
        )

    def _train(self) -> Stage:
        """The whole model as a pipeline over the workers; recomputation adds a pass forward."""
        blocks, options = self.shapes.num_blocks, self.training
        step = trained(self.shapes, self.kept, self.tokens) * 4 / 3 * blocks
        step += 6.0 * self.tokens * self.shapes.head_values
        work = Work(single=options.epochs * self.sequences * step)
        micro = max(self.sequences // options.batches, 1)
        filling = (micro + self.workers - 1) / micro
        state = 12.0 * self.kept * blocks * sum(e.values for e in self.shapes.of_block(0))
        snapshots = options.epochs * options.batches / options.every
        saving = Work(write=state * snapshots / self.workers)

        def take(rates: Rates) -> float:
            return work.seconds(rates) / self.workers * filling + saving.seconds(rates)

        return Stage(
            name="train",
            flops=work.flops,
            seconds=self._seconds(take),
            device=self._training(self.recipe.train, min(self.workers, blocks)),
        )

    def _training(self, mode: str, workers: int) -> Footprint:
        return memory.training(
            self.shapes,
            self.kept,
            mode,
            workers,
            tokens=self.tokens,
            stored_targets=self.training.targets == "stored",
        )

    def _write(self) -> Stage:
        size = float(self._final()["bytes"])
        work = Work(read=2 * size, write=size)
        return Stage(
            name="write",
            flops=0.0,
            seconds=self._seconds(lambda rates: work.seconds(rates) / self.workers),
            device=memory.writing(self.shapes),
        )

    def _chunks(self) -> float:
        """Bytes of all sequences at one boundary."""
        return float(self.tokens * self.sequences * self.shapes.hidden * self.itemsize)

    def _host(self) -> Footprint:
        """Beside a device: the process, one tensor on its way, a few chunks, what is written."""
        largest = max(each.values for each in self.shapes.linears)
        window = 8 * self.tokens * self.shapes.hidden * self.itemsize
        parts = {
            "process": HOST_PROCESS,
            "one tensor": max(largest, self.shapes.front_values) * self.shapes.itemsize,
            "chunks": window,
            "written": 4 * largest * self.out_itemsize,
        }
        return Footprint(parts)

    def _run_bytes(self) -> float:
        """Decompositions of all linears, the chunks at the boundaries, and what training keeps."""
        linears = self.shapes.linears
        stored = sum(
            memory.stored_rank(each, self.needs, self.pivoted) * each.rank_cost * self.out_itemsize
            for each in linears
        )
        if self.needs.kind in ("rpca", "sparse", "two_sided_sparse"):
            stored += 8 * sum(each.values for each in linears)
        boundaries = self.shards - 1 if self.needs.labels else min(self.shards - 1, self.workers)
        chunks = boundaries * self._chunks()
        if self.recipe.refine != "none":
            chunks = max(chunks, (self.shapes.num_blocks + 1) * self._chunks())
        kept = self.kept * sum(each.values for each in linears)
        refined = 4 * kept if self.recipe.refine != "none" else 0.0
        snapshots = 2 * 12 * kept if self.recipe.train != "none" else 0.0
        return float(stored) + chunks + refined + snapshots

    def _final(self) -> dict[str, int]:
        """The budget met exactly; indices of sparse parts are not in the bytes."""
        dense = sum(each.values for each in self.shapes.linears)
        kept = share_values(self.shapes.linears, self.kept)
        values = self.shapes.total_values - dense + kept
        return {"values": values, "bytes": values * self.out_itemsize}

    def _infeasible(self, stages: Sequence[Stage]) -> list[str]:
        found = []
        for stage in stages:
            if stage.device.total > self._usable:
                largest = max(stage.device.parts, key=lambda name: stage.device.parts[name])
                found.append(
                    f"{stage.name}: a worker holds {_gb(stage.device.total)}, of which {largest} "
                    f"{_gb(stage.device.parts[largest])}; {_gb(self._usable)} of "
                    f"{_gb(self.limit or 0)} are usable; {self._instead(stage.name)}"
                )
        host = self.resources.host_bytes
        if host is not None and self._host().total > host:
            found.append(
                f"host: a worker holds {_gb(self._host().total)}, {_gb(host)} are there; start "
                "fewer workers on a node"
            )
        return found

    def _instead(self, stage: str) -> str:
        """What would make a stage fit."""
        if stage == "train":
            ways = []
            for mode in memory.TRAINED_BYTES:
                counts = range(self.workers, self.shapes.num_blocks + 1)
                fits = (n for n in counts if self._training(mode, n).total <= self._usable)
                if (workers := next(fits, None)) is not None:
                    ways.append(f"--train {mode} with {workers} workers")
            return f"what fits: {', '.join(ways)}" if ways else "--train none leaves it out"
        if stage in ("refine", "walk", "sweep"):
            return "fewer or shorter sequences (--samples, --sequence-length), or --refine none"
        needed = self._calibrating(1).total / USABLE
        return f"{_gb(needed)} of memory a worker would hold a block"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
