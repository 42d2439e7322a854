"""Forecast of a whole run: shards, memory, storage, time and money, and its feasibility."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.allocate.base import Scoring
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.doubles import float64_remark, float64_seconds
from orchestrator.forecast.fixed.stages import (
    calibration_memory,
    fewest_groups,
    one_block_remedy,
    stage_costs,
)
from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.outcome import Forecast, Resources, StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.room import MOST_BLOCKS, Room
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Setting
from orchestrator.forecast.statistics import kept_rows, method_statistics
from orchestrator.forecast.storage import Storage
from orchestrator.forecast.work import Work
from orchestrator.plan.cost import VALUES
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.plan.experts import GRAM_BYTES, expert_groups, most_experts
from orchestrator.plan.whole_experts import check_no_experts
from orchestrator.readable import size
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import ResolvedRecipe, check_targets, resolve
from orchestrator.stage_names import CALIBRATE

HOST_PROCESS = 1_500_000_000
"""Bytes of host memory of a worker before it holds anything: torch, transformers, Ray, CUDA."""


def forecast(shapes: Shapes, recipe: Recipe, resources: Resources) -> Forecast:
    """Forecast a recipe on a model of these shapes; takes milliseconds.

    Raises:
        UsageError: As `resolve`; a selector of the recipe covers no linear.
        InfeasibleError: No plan is as small as the budget.
    """
    return _Forecasting(shapes, resolve(recipe), resources).forecast()


def costs_of(shapes: Shapes, resolved: ResolvedRecipe) -> Costs:
    """Costs of the calls of a run.

    Raises:
        UsageError: A selector of the recipe covers no linear, or one in a vision tower that the
            recipe cannot compress.
        InfeasibleError: No plan is within a budget of operations or time, or with experts within
            any.
        InputError: A table of times lacks the shape of a linear.
    """
    recipe = resolved.recipe
    targeted = shapes.narrowed(recipe.target, recipe.ignore)
    check_targets(targeted.linears, resolved)
    if resolved.method.expert_activations:
        targeted = targeted.of_experts(resolved.method.name)
    if resolved.method.input_means:
        check_no_experts(targeted.linears, resolved.method.name)
    grouping = resolved.method.grouping
    grouping.check(targeted.linears, resolved.method.name)
    allocator = resolved.allocator
    is_asked = allocator.needs_block_cosines or allocator.scoring is Scoring.GATES
    if shapes.modules or allocator.drop != "no" or is_asked:
        is_of_values = resolved.budget.cost is VALUES
        checked = grouping.stacked(targeted.linears) if is_of_values else targeted.linears
        budget = replace(resolved.budget, experts=shapes.modules)
        allocator.check_budget(checked, budget)
    if resolved.budget.cost is not VALUES:
        resolved.budget.total(targeted.linears)
    return Costs(targeted, recipe, resolved.method, allocator, resolved.budget)


class _Forecasting:
    def __init__(self, shapes: Shapes, resolved: ResolvedRecipe, resources: Resources) -> None:
        recipe, self.resources = resolved.recipe, resources
        self.costs = costs_of(shapes, resolved)
        self.shapes, self.method = self.costs.shapes, resolved.method
        self.tokens, self.sequences = self.costs.tokens, self.costs.sequences
        self.workers = resources.workers
        limit = resources.memory_bytes or resources.machine.memory_bytes
        self.room = Room(limit, resources.machine.is_gpu)
        group = self.method.grouping.size
        self.groups = fewest_groups(self.costs, self.room)
        self.blocks = max(self._blocks_that_fit(), group) if self.groups == 1 else group
        shards = recipe.shards or max(
            default_shards(shapes.num_blocks, self.workers, self.blocks), 1
        )
        self.shards = len(cut_blocks(shapes.num_blocks, shards, group))
        self.setting = Setting(
            costs=self.costs,
            room=self.room,
            rates=tuple(resources.machine.rows),
            workers=self.workers,
            shards=self.shards,
            groups=self.groups,
        )
        self.later = stage_costs(self.setting, resolved)
        self.storage = Storage(self.setting, self.later)

    def _calibrating(self, blocks: int) -> Footprint:
        return calibration_memory(self.costs, self.room, blocks, self.groups)

    def _blocks_that_fit(self) -> int:
        """Blocks of a shard that fit in memory; a run cuts its shards in the same way."""
        most = min(MOST_BLOCKS, self.shapes.num_blocks)
        fitting = [b for b in range(1, most + 1) if self.room.fits(self._calibrating(b))]
        return max(fitting, default=1)

    def forecast(self) -> Forecast:
        held = self.storage.stages
        later = [cost.forecast(held[name]) for name, cost in self.later.items()]
        stages = [self._calibrate(), *later]
        stages = [replace(each, device=self.room.taken(each.device)) for each in stages]
        machine = self.resources.machine
        slow = {name: cost for name, cost in self.later.items() if cost.is_float64}
        calls = [call for cost in slow.values() for call in cost.calls()]
        float64 = float64_seconds(self.costs, calls, machine, self.workers)
        in_float64 = [stage for stage in stages if stage.name in {CALIBRATE, *slow}]
        sources = [*(rates.source for rates in machine.rows), machine.model_source]
        return Forecast(
            model=self._model(),
            machine=machine.name,
            is_gpu=machine.is_gpu,
            workers=self.workers,
            shards=self.shards,
            blocks_a_shard=-(-self.shapes.num_blocks // self.shards),
            blocks_that_fit=self.blocks,
            experts=self._experts(),
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
            moved_bytes=2 * self._chunks() * (self.shards - 1) * self.groups,
            final=self._final(),
            index_bytes=self.costs.index_bytes,
            float64=float64,
            float64_remark=float64_remark(float64, machine, in_float64),
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

    def _calibrate(self) -> StageForecast:
        """Shards in waves: load, pass all chunks, decompose; shards of a wave start one by one.

        With gradients there are two passes. The first only stores chunks at boundaries, and is
        repeated for all segments but the last. All passes are repeated for every group of experts,
        which has its part of the products of statistics.
        """
        blocks = -(-self.shapes.num_blocks // self.shards)
        draws, costs, sequences, groups = (
            self.method.label_draws,
            self.costs,
            self.sequences,
            self.groups,
        )
        carried = costs.goes() + (costs.comes() if self.shards > 1 else Work())
        finish = costs.finish().times(blocks / groups)
        bare = costs.forward(blocks).times(2 if draws else 1)
        part = costs.gather(blocks) + bare.times(-1)
        gather = costs.gather(blocks) if groups == 1 else bare + part.times(1 / groups)
        gather += carried
        passes = [(gather, sequences, finish, self.shards)]
        repeated = bare.flops * max(draws, 1)
        flops = costs.compute().flops
        if draws:
            back = gather + (costs.comes() if self.shards > 1 else Work())
            forward = costs.forward(blocks) + carried
            segments = [len(each) for each in self.storage.segments]
            passes = [
                (forward, sequences, Work(), self.shards),
                *((forward, sequences, Work(), shards) for shards in segments[:-1]),
                *((back, draws * sequences, finish, shards) for shards in segments),
            ]
            again = sum(segments[:-1]) * sequences * costs.forward(blocks).flops
            flops += groups * again
            repeated += costs.forward(blocks).flops
        flops += (groups - 1) * sequences * self.shards * repeated
        # the worker with the last block computes the logits as well
        head = costs.head().times(draws * sequences * groups)
        flops += (groups - 1) * costs.head().times(draws * sequences).flops

        def take(rates: Rates) -> float:
            return head.seconds(rates) + groups * sum(
                self._waves(costs.load(blocks) + end, chunk, rates, count=count, shards=shards)
                for chunk, count, end, shards in passes
            )

        return StageForecast(
            name=CALIBRATE,
            flops=flops,
            seconds=self.setting.seconds(take),
            device=self._calibrating(blocks),
        )

    def _experts(self) -> dict[str, int]:
        """Memory of the statistics of the experts of a block; empty if there are none."""
        shapes, costs = self.shapes, self.costs
        linears = [each for each in shapes.heaviest if shapes.is_expert(each.name)]
        if not linears:
            return {}
        (first, *_) = expert_groups(linears, frozenset(shapes.experts), self.groups)
        statistics = method_statistics(first, self.method)
        rows = kept_rows(shapes, statistics, self.tokens * self.sequences, costs.itemsize)
        return {
            "count": most_experts(linears, frozenset(shapes.experts)),
            "groups": self.groups,
            "rows": rows.size,
            "grams": GRAM_BYTES * (statistics.entries - rows.entries),
        }

    def _waves(self, ends: Work, chunk: Work, rates: Rates, *, count: int, shards: int) -> float:
        """Seconds of a pass: shards in waves, and the delay until the last shard has begun."""
        waves = -(-shards // self.workers)
        filling = min(shards, self.workers) - 1
        one = ends.overlapped(rates) + count * chunk.overlapped(rates)
        return waves * one + filling * chunk.overlapped(rates)

    def _chunks(self) -> float:
        """Bytes of all sequences at one boundary."""
        return self.sequences * self.costs.state

    def _host(self) -> Footprint:
        """Host memory beside a device: process, one tensor in transfer, chunks, written data."""
        largest = max(each.values for each in self.shapes.linears)
        parts = {
            "process": HOST_PROCESS,
            "one tensor": max(largest, self.shapes.front_values) * self.shapes.itemsize,
            "chunks": int(8 * self.costs.state),
            "written": 4 * largest * self.costs.out_itemsize,
        }
        if any(cost.unpacks_boundary for cost in self.later.values()):
            # chunks of other workers are unpacked from files
            parts["a boundary"] = int(self._chunks())
        return Footprint(parts)

    def _final(self) -> dict[str, int]:
        """Size of the result if the budget is met exactly, without indices."""
        values = self.costs.final_values
        return {"values": values, "bytes": values * self.costs.out_itemsize}

    def _infeasible(self, stages: Sequence[StageForecast]) -> list[str]:
        found = []
        for stage in stages:
            if stage.device.total > self.room.usable:
                largest = max(stage.device.parts, key=lambda name: stage.device.parts[name])
                found.append(
                    f"{stage.name}: a worker holds {size(stage.device.total)}, of which {largest} "
                    f"{size(stage.device.parts[largest])}; {size(self.room.usable)} of "
                    f"{size(self.room.bytes or 0)} are usable; {self._remedy(stage.name)}"
                )
        host = self.resources.host_bytes
        if host is not None and self._host().total > host:
            found.append(
                f"host: a worker holds {size(self._host().total)}, {size(host)} are there; start "
                "fewer workers on a node"
            )
        return found

    def _remedy(self, stage: str) -> str:
        """Changes with which a stage fits."""
        if stage in self.later:
            return self.later[stage].remedy()
        return one_block_remedy(self.costs, self.room, self.groups)
