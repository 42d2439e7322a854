"""Cost of the refit of left factors."""

from collections.abc import Mapping

from orchestrator.forecast.memory import (
    PROCESS_BYTES,
    SETTLED_BYTES,
    Footprint,
    activation_bytes,
)
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Parts, StageCost
from orchestrator.forecast.statistics import gathering, input_statistics, kept_rows
from orchestrator.forecast.work import Work
from orchestrator.plan.experts import GRAM_BYTES


class RefitCost(StageCost):
    """The cut model calibrated again with every Gram of inputs, and left factors fitted to it."""

    def forecast(self, held: Footprint) -> StageForecast:
        setting = self.setting
        blocks = -(-setting.shapes.num_blocks // setting.shards)
        one, waves = self._shard(blocks), -(-setting.shards // setting.workers)
        itemsize = setting.costs.itemsize
        return StageForecast(
            name="refit",
            flops=setting.shards * one.flops,
            seconds=setting.seconds(lambda rates: waves * one.overlapped(rates)),
            device=refitting(
                setting.shapes,
                blocks,
                tokens=setting.tokens,
                sequences=setting.sequences,
                itemsize=itemsize,
            ),
        )

    def shares(self) -> Mapping[str, Work]:
        """A chunk passes a cut block, and a block's factors are fitted."""
        costs, shapes = self.setting.costs, self.setting.shapes
        statistics = input_statistics(shapes.heaviest)
        passed = gathering(shapes, statistics, self.setting.tokens, costs.itemsize)
        fitted = sum(2.0 * each.values * each.in_features for each in shapes.heaviest)
        return {
            "open": costs.load(1),
            "gather": passed,
            "forward": costs.forward(1),
            "finish": Work(double=fitted),
        }

    def _shard(self, blocks: int) -> Work:
        """A shard of the cut model: loaded, all sequences passed, left factors fitted."""
        costs, shapes = self.setting.costs, self.setting.shapes
        statistics = input_statistics(shapes.heaviest)
        one = gathering(shapes, statistics, self.setting.tokens, costs.itemsize)
        passed = (one.times(blocks) + costs.goes() + costs.comes()).times(costs.sequences)
        fitted = sum(2.0 * each.values * each.in_features for each in shapes.heaviest)
        return costs.load(blocks) + passed + Work(double=fitted).times(blocks)

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        factors = self.setting.costs.out_itemsize * self.setting.kept_values
        after = {**before, "fitted factors": factors}
        return {**after, "chunks": self.setting.in_flight}, after

    def remedy(self) -> str:
        return f"--option {self.setting.recipe.method}.refit=never leaves it out"


def refitting(
    shapes: Shapes, blocks: int, *, tokens: int, sequences: int, itemsize: int
) -> Footprint:
    """Footprint of a shard of the cut model whose left factors are fitted to their own inputs."""
    statistics = input_statistics(shapes.heaviest)
    sites, rows = statistics.grams, kept_rows(shapes, statistics, tokens * sequences, itemsize)
    largest = max(linear.values for linear in shapes.heaviest)
    entries = blocks * (statistics.entries - rows.entries)
    weights = {"process": PROCESS_BYTES, "weights": blocks * shapes.block_values * itemsize}
    passing = {
        "embeddings": shapes.front_values * itemsize,
        "Grams": GRAM_BYTES * entries,
        **rows.part(blocks * rows.size),
        "activations": activation_bytes(shapes, tokens, itemsize, 1),
    }
    fitting = {
        "Grams": SETTLED_BYTES * (entries + max(rows.sources.values(), default=0) ** 2),
        **rows.part(blocks * rows.size),
        "fit": 3 * 8 * max(n * n for n in sites.values()) + 3 * 8 * largest,
    }
    moments = [Footprint(weights | each) for each in (passing, fitting)]
    return max(moments, key=lambda each: each.total)
