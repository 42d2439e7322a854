"""Expected times of a run's stages and calls, by which progress estimates the time that is left."""

from collections.abc import Mapping

from orchestrator.allocate.base import Scoring
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.fixed.learn import LearnCost
from orchestrator.forecast.forecast import costs_of
from orchestrator.forecast.outcome import Forecast, Resources
from orchestrator.forecast.room import Room
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Setting
from orchestrator.forecast.work import Work
from orchestrator.progress.eta import Expected
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve


def expected(found: Forecast, shapes: Shapes, recipe: Recipe, resources: Resources) -> Expected:
    """Return the seconds of all stages, and of a unit of each kind of call (`Schedule.share`).

    Args:
        found: The forecast with these resources; the first row of rates counts.

    Raises:
        UsageError: As `forecast`.
    """
    resolved, (rates, *_) = resolve(recipe), resources.machine.rows
    costs = costs_of(shapes, resolved)
    setting = Setting(
        costs=costs,
        room=Room(resources.memory_bytes, is_gpu=found.is_gpu),
        rates=tuple(resources.machine.rows),
        workers=found.workers,
        shards=found.shards,
        groups=found.expert_groups,
    )
    work: dict[str, Mapping[str, Work]] = {
        "calibrate": _calibration(costs, found.blocks_a_shard),
        "score": _scoring(costs, found.blocks_a_shard),
        "write": {"write": costs.file()},
    }
    if costs.allocator.scoring is Scoring.GATES:
        work["learn"] = LearnCost(setting).shares()
    work |= {stage.name: stage.cost(setting).shares() for stage in resolved.stages}
    return Expected(
        units={
            stage: {kind: each.seconds(rates) for kind, each in kinds.items()}
            for stage, kinds in work.items()
        },
        stages={stage.name: stage.seconds[rates.row] for stage in found.stages},
    )


def _calibration(costs: Costs, blocks: int) -> dict[str, Work]:
    """Units of a pass with statistics, and of one with gradients.

    Args:
        blocks: Blocks of a shard; the last one has the head beside its own.
    """
    return {
        "open": costs.load(1),
        "forward": costs.forward(1),
        "gather": costs.gather(1),
        "back": costs.gather(1),
        "turn": costs.gather(1) + costs.head().times(1 / blocks),
        "finish": costs.finish().times(costs.method.grouping.size),
    }


def _scoring(costs: Costs, blocks: int) -> dict[str, Work]:
    head = costs.head().times(1 / 3 / blocks)
    forward = costs.forward(1)
    return {"open": costs.load(1), "forward": forward, "score": forward + head}
