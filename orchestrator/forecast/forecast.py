"""A whole run, forecast: shards, memory, bytes, time and money, and whether it can be at all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.forecast import memory
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.doubles import float64_remark, float64_seconds
from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.needs import Needs
from orchestrator.forecast.outcome import Forecast, Resources, StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.room import MOST_BLOCKS, Room
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.storage import STATE_BYTES, Storage
from orchestrator.forecast.work import Work, kept_values, trained
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.recipe.recipe import Recipe

HOST_PROCESS = 1_500_000_000
"""Bytes of host memory of a worker before it holds anything: torch, transformers, Ray, CUDA."""


def forecast(shapes: Shapes, recipe: Recipe, resources: Resources) -> Forecast:
    """What a recipe takes of a model's shapes; milliseconds.

    Raises:
        UsageError: The recipe names a method or an option that there is not.
        InfeasibleError: No plan stores as little as is asked for.
    """
    return _Forecasting(shapes, recipe, resources).forecast()


class _Forecasting:
    def __init__(self, shapes: Shapes, recipe: Recipe, resources: Resources) -> None:
        self.recipe, self.resources = recipe, resources
        self.shapes = shapes.narrowed(recipe.target, recipe.ignore)
        self.costs = Costs(self.shapes, recipe)
        self.needs: Needs = self.costs.needs
        self.tokens, self.sequences = recipe.sequence_length, recipe.samples
        self.kept = recipe.share
        self.refining = RefineOptions(**recipe.options.get("refinement", {}))
        self.training = TrainOptions(**recipe.options.get("training", {}))
        self.workers = resources.workers
        limit = resources.memory_bytes or resources.machine.memory_bytes
        self.room = Room(limit, resources.machine.is_gpu)
        self.even = self.needs.allocation == "uniform"
        group = self.needs.group
        self.blocks = max(self._blocks_that_fit(), group)
        shards = recipe.shards or max(
            default_shards(shapes.num_blocks, self.workers, self.blocks), 1
        )
        self.shards = len(cut_blocks(shapes.num_blocks, shards, group))
        self.storage = Storage(self.costs, self.workers, self.shards)

    def _calibrating(self, blocks: int) -> Footprint:
        return memory.calibration(
            self.shapes,
            self.needs,
            blocks,
            tokens=self.tokens,
            sequences=self.sequences,
            itemsize=self.costs.itemsize,
            pivoted=self.costs.is_pivoted,
            gpu=self.room.is_gpu,
        )

    def _blocks_that_fit(self) -> int:
        """Of a shard; a run that meets the limit cuts its shards in the same way."""
        most = min(MOST_BLOCKS, self.shapes.num_blocks)
        fitting = [b for b in range(1, most + 1) if self.room.fits(self._calibrating(b))]
        return max(fitting, default=1)

    def forecast(self) -> Forecast:
        stages = [self._calibrate()]
        if self.needs.scores:
            stages.append(self._score())
        if self.needs.refits(self.kept):
            stages.append(self._refit())
        if self.costs.is_pivoted:
            stages.append(self._pivot())
        if self.recipe.compensate != "none" or self.recipe.refine == "in_order":
            stages.append(self._walk())
        if self.recipe.refine in ("blocks", "swept"):
            stages.append(self._refine())
        if self.recipe.refine == "swept":
            stages.append(self._walk("sweep"))
        if self.recipe.train != "none":
            stages.append(self._train())
        stages.append(self._write())
        stages = [replace(each, device=self.room.taken(each.device)) for each in stages]
        machine = self.resources.machine
        float64 = float64_seconds(self.costs, machine, self.workers)
        in_float64 = [stage for stage in stages if stage.name in ("calibrate", "pivot")]
        double_stages = self._seconds(lambda r: sum(each.seconds[r.row] for each in in_float64))
        sources = [*(rates.source for rates in machine.rows), machine.model_source]
        return Forecast(
            model=self._model(),
            machine=machine.name,
            is_gpu=machine.is_gpu,
            workers=self.workers,
            shards=self.shards,
            blocks_a_shard=-(-self.shapes.num_blocks // self.shards),
            blocks_that_fit=self.blocks,
            waves=-(-self.shards // self.workers),
            stages=tuple(stages),
            limits={
                "device": self.room.bytes,
                "usable": self.room.bytes and self.room.usable,
                "host": self.resources.host_bytes,
            },
            host=self._host(),
            run=self.storage.stages,
            segments=len(self.storage.segments),
            keeps_states=self.storage.keeps_states,
            moved_bytes=2 * self._chunks() * (self.shards - 1),
            final=self._final(),
            float64=float64,
            float64_remark=float64_remark(float64, machine, double_stages),
            start_seconds={rates.row: rates.start for rates in machine.rows},
            price=self.resources.price,
            sources=tuple(filter(None, dict.fromkeys(sources))),
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

    def _calibrate(self) -> StageForecast:
        """Shards in waves: load, pass all chunks, decompose; a wave's shards start one by one.

        With gradients there are two passes. The first only stores chunks at boundaries, and is
        repeated for all segments but the last.
        """
        blocks = -(-self.shapes.num_blocks // self.shards)
        labels, costs, sequences = self.needs.labels, self.costs, self.sequences
        carried = costs.goes() + (costs.comes() if self.shards > 1 else Work())
        finish = costs.finish().times(blocks)
        gather = costs.gather(blocks) + carried
        passes = [(gather, sequences, finish, self.shards)]
        flops = costs.compute().flops
        if labels:
            back = gather + (costs.comes() if self.shards > 1 else Work())
            forward = costs.forward(blocks) + carried
            segments = [len(each) for each in self.storage.segments]
            passes = [
                (forward, sequences, Work(), self.shards),
                *((forward, sequences, Work(), shards) for shards in segments[:-1]),
                *((back, labels * sequences, finish, shards) for shards in segments),
            ]
            flops += sum(segments[:-1]) * sequences * costs.forward(blocks).flops
        # behind the last block: the worker that has it does that too
        head = costs.head().times(labels * sequences)

        def take(rates: Rates) -> float:
            return head.seconds(rates) + sum(
                self._waves(costs.load(blocks) + end, chunk, count, shards, rates)
                for chunk, count, end, shards in passes
            )

        return StageForecast(
            name="calibrate",
            flops=flops,
            seconds=self._seconds(take),
            device=self._calibrating(blocks),
        )

    def _waves(self, ends: Work, chunk: Work, count: int, shards: int, rates: Rates) -> float:
        """Seconds of a pass: what each shard takes, in waves, and until the last one has begun."""
        waves = -(-shards // self.workers)
        filling = min(shards, self.workers) - 1
        one = ends.overlapped(rates) + count * chunk.overlapped(rates)
        return waves * one + filling * chunk.overlapped(rates)

    def _score(self) -> StageForecast:
        """Passes through models that are masked, or cut in one place."""
        forward = self.costs.forward(self.shapes.num_blocks)
        passes = float(self.needs.masked)
        if self.needs.scores == "sensitivities":
            # a trial runs from the block that it cuts on: half of the model in the mean
            passes = self.needs.trials * len(self.shapes.linears) / 2
        work = forward.times(passes)
        return StageForecast(
            name="score",
            flops=work.flops,
            seconds=self._seconds(lambda rates: work.seconds(rates) / self.workers),
            device=self._calibrating(1),
        )

    def _refine(self) -> StageForecast:
        """Every block a unit, as many at a time as there are workers."""
        waves = -(-self.shapes.num_blocks // self.workers)
        one = self.costs.refine()
        fits = [b for b in (1, MOST_BLOCKS) if self.room.fits(self._refining(b))]
        return StageForecast(
            name="refine",
            flops=self.shapes.num_blocks * one.flops,
            seconds=self._seconds(lambda rates: waves * one.seconds(rates)),
            device=self._refining(max(fits, default=1)),
        )

    def _refining(self, blocks: int) -> Footprint:
        return memory.refinement(
            self.shapes,
            self.kept,
            self.even,
            blocks,
            tokens=self.tokens,
            sequences=self.sequences,
            itemsize=self.costs.itemsize,
        )

    def _walk(self, name: str = "walk") -> StageForecast:
        """Block after block, each lent to all workers; unrefined one pass of statistics."""
        blocks, refines = self.shapes.num_blocks, self.recipe.refine in ("in_order", "swept")
        lent = min(self.workers, self.refining.slices)
        costs = self.costs
        compensates = self.recipe.compensate != "none"
        # dense, compressed before and behind what is done; the compressed one is float32
        one = costs.forward(1) + costs.forward_in_float32(2)
        if compensates:
            one += costs.drift()
        one = one.times(self.sequences)
        if refines:
            one += costs.epochs()
        parameters = kept_values(self.shapes, self.kept)
        steps = self.refining.epochs * self.refining.batches if refines else 0
        lending = Work(network=4.0 * parameters * steps if lent > 1 else 0.0)
        solving = costs.turns() if compensates else Work()

        def take(rates: Rates) -> float:
            shared = one.seconds(rates) / lent
            return blocks * (shared + lending.seconds(rates) + solving.seconds(rates))

        return StageForecast(
            name=name,
            flops=blocks * (one.flops + solving.flops),
            seconds=self._seconds(take),
            device=memory.walking(
                self.shapes,
                self.kept,
                self.even,
                tokens=self.tokens,
                sequences=self.sequences,
                itemsize=costs.itemsize,
                lent=lent,
                compensates=compensates,
                refines=refines,
            ),
        )

    def _refit(self) -> StageForecast:
        """The cut model calibrated again, every Gram of inputs, and left factors fitted to it."""
        blocks = -(-self.shapes.num_blocks // self.shards)
        one = self.costs.calibrate_cut(blocks)
        waves = -(-self.shards // self.workers)
        return StageForecast(
            name="refit",
            flops=self.shards * one.flops,
            seconds=self._seconds(lambda rates: waves * one.overlapped(rates)),
            device=memory.refitting(
                self.shapes, blocks, tokens=self.tokens, itemsize=self.costs.itemsize
            ),
        )

    def _train(self) -> StageForecast:
        """The whole model as a pipeline over the workers; recomputation adds a pass forward."""
        blocks, options, costs = self.shapes.num_blocks, self.training, self.costs
        step = trained(self.shapes, self.kept, self.tokens) * 4 / 3 * blocks
        step += self.costs.head().flops
        work = Work(single=options.epochs * self.sequences * step)
        micro = max(self.sequences // options.batches, 1)
        filling = (micro + self.workers - 1) / micro
        each = STATE_BYTES[self.recipe.train] if self.storage.keeps_states else costs.out_itemsize
        state = float(each * blocks) * kept_values(self.shapes, self.kept)
        snapshots = options.epochs * options.batches / options.every
        saving = Work(write=state * snapshots / self.workers)

        def take(rates: Rates) -> float:
            return work.seconds(rates) / self.workers * filling + saving.seconds(rates)

        return StageForecast(
            name="train",
            flops=work.flops,
            seconds=self._seconds(take),
            device=self._training(self.recipe.train, min(self.workers, blocks)),
        )

    def _training(self, mode: str, workers: int) -> Footprint:
        return memory.training(
            self.shapes,
            self.kept,
            self.even,
            mode,
            workers,
            tokens=self.tokens,
            stored_targets=self.training.targets == "stored",
        )

    def _pivot(self) -> StageForecast:
        """Every linear a unit; the last of them may keep one worker longer than the others."""
        pivots = self.costs.pivots

        def take(rates: Rates) -> float:
            seconds = [each.seconds(rates) for each in pivots]
            return max(sum(seconds) / self.workers, max(seconds, default=0.0))

        return StageForecast(
            name="pivot",
            flops=sum(each.flops for each in pivots),
            seconds=self._seconds(take),
            device=memory.pivoting(self.shapes, self.kept, self.costs.out_itemsize),
        )

    def _write(self) -> StageForecast:
        files, one = self.costs.files, self.costs.file()
        waves = -(-files // self.workers)
        return StageForecast(
            name="write",
            flops=0.0,
            seconds=self._seconds(lambda rates: waves * one.seconds(rates)),
            device=memory.writing(self.shapes),
        )

    def _chunks(self) -> float:
        """Bytes of all sequences at one boundary."""
        return self.sequences * self.costs.state

    def _host(self) -> Footprint:
        """Beside a device: the process, one tensor on its way, a few chunks, what is written."""
        largest = max(each.values for each in self.shapes.linears)
        parts = {
            "process": HOST_PROCESS,
            "one tensor": max(largest, self.shapes.front_values) * self.shapes.itemsize,
            "chunks": int(8 * self.costs.state),
            "written": 4 * largest * self.costs.out_itemsize,
        }
        if self.recipe.refine != "none" or self.recipe.compensate != "none":
            # what was not made here is unpacked from files
            parts["a boundary"] = int(self._chunks())
        return Footprint(parts)

    def _final(self) -> dict[str, int]:
        """The budget met exactly; indices of sparse parts are not in the bytes."""
        values = self.costs.final_values
        return {"values": values, "bytes": values * self.costs.out_itemsize}

    def _infeasible(self, stages: Sequence[StageForecast]) -> list[str]:
        found = []
        for stage in stages:
            if stage.device.total > self.room.usable:
                largest = max(stage.device.parts, key=lambda name: stage.device.parts[name])
                found.append(
                    f"{stage.name}: a worker holds {_gb(stage.device.total)}, of which {largest} "
                    f"{_gb(stage.device.parts[largest])}; {_gb(self.room.usable)} of "
                    f"{_gb(self.room.bytes or 0)} are usable; {self._instead(stage.name)}"
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
                fits = (n for n in counts if self.room.fits(self._training(mode, n)))
                if (workers := next(fits, None)) is not None:
                    ways.append(f"--train {mode} with {workers} workers")
            return f"what fits: {', '.join(ways)}" if ways else "--train none leaves it out"
        if stage == "refit":
            return f"--option {self.recipe.method}.refit=never leaves it out"
        if stage == "pivot":
            return "--storage plain leaves it out"
        if stage in ("refine", "walk", "sweep"):
            less = ["fewer or shorter sequences (--samples, --sequence-length)"]
            less += ["--compensate none"] if self.recipe.compensate != "none" else []
            less += ["--refine none"] if self.recipe.refine != "none" else []
            return ", or ".join(less)
        needed = self.room.needed(self._calibrating(1))
        return f"{_gb(needed)} of memory a worker would hold a block"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
