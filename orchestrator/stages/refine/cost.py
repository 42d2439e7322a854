"""Cost of the refinement of blocks in parallel."""

from collections.abc import Mapping, Sequence

from orchestrator.forecast.block_training import epochs, smaller_blocks
from orchestrator.forecast.memory import (
    PROCESS_BYTES,
    REFINED_BYTES,
    Footprint,
    activation_bytes,
    trained_block,
)
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.room import MOST_BLOCKS
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Parts, Setting, StageCost
from orchestrator.forecast.storage import TRAINED_BYTES
from orchestrator.forecast.work import Work
from orchestrator.models.training.refine_options import RefineOptions


class RefineCost(StageCost):
    """One unit for every block, as many at a time as there are workers."""

    unpacks_boundary = True

    def __init__(self, setting: Setting, options: RefineOptions) -> None:
        super().__init__(setting)
        self._options = options

    def calls(self) -> Sequence[Work]:
        """By block: it is trained, with reading of its chunks, weights and targets."""
        setting, costs = self.setting, self.setting.costs
        read = 2 * setting.sequences * costs.state
        read += setting.shapes.block_values * setting.shapes.itemsize
        passed = costs.forward(1).times(setting.sequences)
        one = epochs(setting, self._options) + passed + Work(read=read)
        return [one] * setting.shapes.num_blocks

    def shares(self) -> Mapping[str, Work]:
        """A chunk passes a dense block, and a block is trained."""
        costs = self.setting.costs
        return {
            "open": costs.load(1),
            "gather": costs.forward(1),
            "forward": costs.forward(1),
            "finish": epochs(self.setting, self._options),
        }

    def forecast(self, held: Footprint) -> StageForecast:
        setting, blocks = self.setting, self.setting.shapes.num_blocks
        waves, one = -(-blocks // setting.workers), self.calls()[0]
        fits = [b for b in (1, MOST_BLOCKS) if setting.room.fits(self._memory(b))]
        return StageForecast(
            name="refine",
            flops=blocks * one.flops,
            seconds=setting.seconds(lambda rates: waves * one.seconds(rates)),
            device=self._memory(max(fits, default=1)),
        )

    def _memory(self, blocks: int) -> Footprint:
        setting = self.setting
        return refinement(
            setting.shapes,
            setting.kept,
            setting.is_even,
            blocks,
            tokens=setting.tokens,
            sequences=setting.sequences,
            itemsize=setting.costs.itemsize,
        )

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        after = dict(before)
        if "walked blocks" not in before:
            # spent block by block as refined ones are committed
            after.pop("pivoted factors", None)
        after["refined blocks"] = TRAINED_BYTES * self.setting.kept_values
        return {**after, "chunks": self.setting.in_flight}, after

    def remedy(self) -> str:
        return smaller_blocks(self.setting.recipe)


def refinement(
    shapes: Shapes,
    kept: float,
    even: bool,
    blocks: int,
    *,
    tokens: int,
    sequences: int,
    itemsize: int,
) -> Footprint:
    """Footprint of one block in training, beside a dense shard and the chunks at its boundaries."""
    states = (blocks + 1) * tokens * sequences * shapes.hidden * itemsize
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "training state": trained_block(shapes, kept, even, REFINED_BYTES),
            "dense shard": (blocks * shapes.block_values + shapes.front_values) * itemsize,
            "inputs and targets": states,
            "activations": activation_bytes(shapes, tokens, 4, 1),
        }
    )
