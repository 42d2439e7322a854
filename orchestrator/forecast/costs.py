"""Work of each call of a closed-form compression: FLOPs, and bytes read and written."""

from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.statistics import decomposing_block, gathering, method_statistics
from orchestrator.forecast.work import Work, computed, forward_flops
from orchestrator.methods.base import Method
from orchestrator.plan.codecs import CODECS, itemsize_of
from orchestrator.plan.cost import VALUES
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.recipe import LONGEST_SEQUENCE, MOST_SAMPLES, Recipe

TOKEN_BYTES = 9
"""Bytes of a token beside its state: an id of 8 bytes, and a mask entry."""


@dataclass(frozen=True)
class Costs:
    """Work of the calls for one recipe and one model."""

    shapes: Shapes
    """With the targeted linears only."""
    recipe: Recipe
    method: Method
    allocator: Allocator
    budget: Budget

    @property
    def num_blocks(self) -> int:
        return self.shapes.num_blocks

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.recipe.sequence_length or LONGEST_SEQUENCE

    @property
    def sequences(self) -> int:
        return self.recipe.samples or MOST_SAMPLES

    @property
    def label_draws(self) -> int:
        """Backward passes of each sequence."""
        return self.method.label_draws

    @property
    def is_pivoted(self) -> bool:
        return self.recipe.storage == "pivoted"

    @property
    def itemsize(self) -> int:
        """Bytes of a value in the passes."""
        return itemsize_of(self.recipe.dtype, self.shapes.itemsize)

    @property
    def out_itemsize(self) -> int:
        return itemsize_of(self.recipe.output_dtype, self.shapes.itemsize)

    @property
    def state(self) -> float:
        """Bytes of one sequence at a boundary."""
        return float(self.tokens * self.shapes.hidden * self.itemsize)

    @property
    def boundary(self) -> float:
        """Bytes at one boundary of all sequences: a state, an id and a mask entry a token."""
        return self.sequences * (self.state + TOKEN_BYTES * self.tokens)

    @property
    def model_bytes(self) -> int:
        """Bytes of the dense model."""
        return self.shapes.total_values * self.shapes.itemsize

    @cached_property
    def kept(self) -> float:
        """Kept fraction of the targeted values.

        Of a budget of operations or time that of an even division of the block with the most
        values: curves are not known. Where even ranks are too small, the fraction itself.
        """
        budget, linears = self.budget, self.shapes.heaviest
        if budget.cost is VALUES:
            return budget.kept

        def divide(each: Budget) -> Plan:
            return Uniform()(linears, {}, each, {})

        try:
            plan = fill_budget(divide, linears, replace(budget, multiple=1), CODECS["float32"])
        except InfeasibleError:
            return budget.kept
        return plan.stored_values / sum(each.values for each in linears)

    @cached_property
    def final_values(self) -> int:
        """Values of the result if the budget is met exactly."""
        dense = sum(each.values for each in self.shapes.linears)
        return (
            self.shapes.total_values
            - dense
            + self.budget.in_values(self.kept).share(self.shapes.linears)
        )

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of the indices beside these values, 0 for a budget in bytes, which includes them.

        Each linear is taken to store the kept fraction of its values. Of a form with factors and
        entries all of them are taken for entries, whose index is the largest.
        """
        form, kept = self.budget.form, self.kept
        if self.budget.in_bytes or kept == 1:
            return 0
        cuts = [
            (each, Assignment(form=form.name, nonzeros=int(kept * each.values)))
            for each in self.shapes.linears
        ]
        return sum(form.index_bytes(each, cut) for each, cut in cuts)

    @cached_property
    def files(self) -> int:
        """Number of files of the result, each with whole blocks."""
        block = self.final_values / self.num_blocks * self.out_itemsize
        return -(-self.num_blocks // max(1, int(self.recipe.max_shard_bytes // block)))

    def compute(self) -> Work:
        """FLOPs of calibration and decomposition of all blocks; no bytes."""
        passed = self.gather(1).times(max(self.label_draws, 1))
        if self.label_draws:
            passed += self.forward(1) + self.head().times(self.label_draws / self.num_blocks)
        whole = (passed.times(self.sequences) + self.finish()).times(self.num_blocks)
        return replace(whole, read=0.0, write=0.0, network=0.0)

    def load(self, blocks: int) -> Work:
        """The weights of a shard."""
        return Work(read=float(blocks * self.shapes.block_values * self.shapes.itemsize))

    def forward(self, blocks: int) -> Work:
        """One sequence through a shard that gathers no statistics."""
        return self._forward.times(blocks)

    def gather(self, blocks: int) -> Work:
        """One sequence through a shard that gathers statistics; one backward pass of gradients."""
        return self._gather.times(blocks)

    def head(self) -> Work:
        """Logits of one sequence, and the gradient of the labels that are drawn from them."""
        flops = 6.0 * self.tokens * self.shapes.head_values
        return computed(flops, self.itemsize)

    def comes(self) -> Work:
        """Transfer of a chunk from another worker."""
        return Work(network=self.state)

    def goes(self) -> Work:
        """Writing of a chunk for the next shard."""
        return Work(write=self.state)

    def finish(self) -> Work:
        """Decomposition of all linears of a block, and writing of the results."""
        return self._finish

    def forward_in_float32(self, blocks: int) -> Work:
        """One sequence through blocks of the compressed model, whose factors are in float32."""
        flops = forward_flops(self.shapes, self.tokens)
        return computed(flops, 4).times(blocks)

    @property
    def input_sites(self) -> list[int]:
        """Channels of the inputs of a block's linears, each input once."""
        return list({each.site: each.in_features for each in self.shapes.heaviest}.values())

    def file(self) -> Work:
        """One file of the result: its tensors are read and cut; it is written, and read to hash."""
        size = self.final_values * self.out_itemsize
        return Work(read=2.0 * size, write=float(size)).times(1 / self.files)

    @cached_property
    def _forward(self) -> Work:
        return computed(forward_flops(self.shapes, self.tokens), self.itemsize)

    @cached_property
    def _gather(self) -> Work:
        statistics = method_statistics(self.shapes.heaviest, self.method)
        return gathering(self.shapes, statistics, self.tokens, self.itemsize)

    @cached_property
    def _finish(self) -> Work:
        return decomposing_block(
            self.shapes.heaviest,
            self.method,
            pivoted=self.is_pivoted,
            itemsize=self.out_itemsize,
        )
