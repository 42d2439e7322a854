"""Costs of stages that are not chosen by a recipe: calibration, scoring, writing.

Calibration is forecast with the cut of the run (`forecast.forecast`); its memory decides the cut.
"""

from collections.abc import Mapping, Sequence

from orchestrator.forecast import memory
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.fixed.learn import LearnCost
from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.room import Room
from orchestrator.forecast.stage_cost import Parts, Setting, StageCost
from orchestrator.forecast.work import Work
from orchestrator.plan.experts import most_experts
from orchestrator.readable import size
from orchestrator.resolve import ResolvedRecipe
from orchestrator.stage_names import LEARN, SCORE, WRITE


def stage_costs(setting: Setting, resolved: ResolvedRecipe) -> dict[str, StageCost]:
    """Costs of all stages after calibration, by name, in the order of the run."""
    costs: Mapping[str, StageCost] = {
        SCORE: ScoreCost(setting),
        LEARN: LearnCost(setting),
        **{stage.name: stage.cost(setting) for stage in resolved.stages},
        WRITE: WriteCost(setting),
    }
    return {name: costs[name] for name in resolved.stage_names if name in costs}


def calibration_memory(costs: Costs, room: Room, blocks: int, groups: int = 1) -> Footprint:
    """Footprint of a worker with a shard of this number of blocks.

    Args:
        groups: Groups of experts.
    """
    return memory.calibration(
        costs.shapes,
        costs.method,
        blocks,
        tokens=costs.tokens,
        sequences=costs.sequences,
        itemsize=costs.itemsize,
        pivoted=costs.is_pivoted,
        gpu=room.is_gpu,
        groups=groups,
    )


def fewest_groups(costs: Costs, room: Room) -> int:
    """The fewest groups of experts with which a block fits, or one for each if none does.

    A recipe that names a number has that, or one for each expert.
    """
    blocks, asked = costs.method.grouping.size, costs.recipe.expert_groups
    most = max(1, most_experts(costs.shapes.heaviest, frozenset(costs.shapes.experts)))
    if not costs.method.takes_experts_apart:
        return 1
    if isinstance(asked, int):
        return min(asked, most)
    too_few, enough = 0, most
    if room.fits(calibration_memory(costs, room, blocks)):
        return 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        fits = room.fits(calibration_memory(costs, room, blocks, middle))
        too_few, enough = (too_few, middle) if fits else (middle, enough)
    return enough


def one_block_remedy(costs: Costs, room: Room, groups: int) -> str:
    """Remedy for a stage whose smallest shard does not fit: the memory with which it does."""
    needed = room.needed(calibration_memory(costs, room, 1, groups))
    return f"{size(needed)} of memory a worker would hold a block"


class ScoreCost(StageCost):
    """Passes through masked models, or through models with a single linear cut."""

    def forecast(self, held: Footprint) -> StageForecast:
        setting, costs = self.setting, self.setting.costs
        passes = costs.allocator.scoring_passes(len(costs.shapes.linears))
        work = costs.forward(costs.num_blocks).times(passes)
        return StageForecast(
            name=SCORE,
            flops=work.flops,
            seconds=setting.seconds(lambda rates: work.seconds(rates) / setting.workers),
            device=calibration_memory(costs, setting.room, 1, setting.groups),
        )

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        return {**before, "chunks": self.setting.in_flight}, before

    def remedy(self) -> str:
        return one_block_remedy(self.setting.costs, self.setting.room, self.setting.groups)


class WriteCost(StageCost):
    """One call for every file of the checkpoint."""

    def calls(self) -> Sequence[Work]:
        """By file, all of one size."""
        return [self.setting.costs.file()] * self.setting.costs.files

    def forecast(self, held: Footprint) -> StageForecast:
        setting, calls = self.setting, self.calls()
        waves = -(-len(calls) // setting.workers)
        return StageForecast(
            name=WRITE,
            flops=0.0,
            seconds=setting.seconds(lambda rates: waves * calls[0].seconds(rates)),
            device=memory.writing(setting.shapes),
        )

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        return before, before

    def remedy(self) -> str:
        return one_block_remedy(self.setting.costs, self.setting.room, self.setting.groups)
