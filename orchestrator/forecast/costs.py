"""What each call of a closed-form compression computes, reads and writes."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from orchestrator.forecast.needs import needs_of
from orchestrator.forecast.shapes import ITEMSIZE_OF, Shapes
from orchestrator.forecast.work import Work, decomposing_block, forward_flops, passing, trained
from orchestrator.models.refine_options import RefineOptions
from orchestrator.recipe import Recipe


class Called(Protocol):
    """A call of a schedule: which method, and which blocks or chunk."""

    @property
    def method(self) -> str: ...

    @property
    def arguments(self) -> tuple[Any, ...]: ...

    @property
    def label(self) -> str: ...

    @property
    def takes(self) -> tuple[int, int] | None: ...

    @property
    def emits(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one recipe and one model; `forward`, `gather` and `write` are of calls."""

    shapes: Shapes
    recipe: Recipe
    blocks_a_shard: int = 2

    @property
    def num_blocks(self) -> int:
        return self.shapes.num_blocks

    @property
    def sequences(self) -> int:
        return self.recipe.samples

    @property
    def labels(self) -> int:
        return needs_of(self.recipe.method).labels

    @property
    def files(self) -> int:
        """Of the result, each with whole blocks."""
        block = self.recipe.share * self.shapes.block_values * self._out_itemsize
        blocks = max(1, int(self.recipe.max_shard_bytes // block))
        return -(-self.num_blocks // blocks)

    @property
    def _itemsize(self) -> int:
        return ITEMSIZE_OF.get(self.recipe.dtype, self.shapes.itemsize)

    @property
    def _out_itemsize(self) -> int:
        return ITEMSIZE_OF.get(self.recipe.output_dtype, self.shapes.itemsize)

    @property
    def _state(self) -> float:
        """Bytes of one sequence at a boundary."""
        return float(self.recipe.sequence_length * self.shapes.hidden * self._itemsize)

    def compute(self) -> Work:
        """FLOPs of calibration and decomposition, of all blocks together; no byte."""
        needs, tokens = needs_of(self.recipe.method), self.recipe.sequence_length
        passed = passing(self.shapes, needs, tokens, self._itemsize).times(self.sequences)
        head = 6.0 * tokens * self.shapes.head_values * self.sequences * needs.labels
        whole = (passed + self._finish()).times(self.num_blocks) + Work(half=head)
        return replace(whole, read=0.0, write=0.0, network=0.0)

    def forward(self, call: Called) -> Work:
        """Of a pass that leaves chunks at the boundaries and no statistics."""
        if call.method == "open":
            return self._load(call)
        flops = _blocks(call) * forward_flops(self.shapes, self.recipe.sequence_length)
        return Work(half=flops) + self._carried(call)

    def gather(self, call: Called) -> Work:
        """Of the pass that leaves statistics: chunks or gradients, and what is then decomposed."""
        if call.method == "open":
            return self._load(call)
        if call.method == "finish":
            return self._finish()
        needs, tokens = needs_of(self.recipe.method), self.recipe.sequence_length
        once = passing(self.shapes, needs, tokens, self._itemsize)
        if needs.labels:
            # the boundaries' pass is counted apart; of the labels this is one
            once = once + Work(half=-forward_flops(self.shapes, tokens))
            once = once.times(1 / needs.labels)
        work = once.times(_blocks(call)) + self._carried(call)
        is_last = needs.labels and call.takes is not None and call.takes[0] == self.num_blocks
        return work + Work(half=6.0 * tokens * self.shapes.head_values) if is_last else work

    def refine(self, call: Called) -> Work:
        """Of one block, trained towards what the dense one gives."""
        options = RefineOptions(**self.recipe.options.get("refinement", {}))
        tokens = self.recipe.sequence_length
        epochs = options.epochs * trained(self.shapes, self.recipe.share, tokens)
        dense = forward_flops(self.shapes, tokens)
        read = 2 * self.sequences * self._state + self.shapes.block_values * self.shapes.itemsize
        return Work(single=self.sequences * epochs, half=self.sequences * dense, read=read)

    def write(self, call: Called) -> Work:
        """Of one file of the result."""
        dense = sum(each.values for each in self.shapes.linears)
        values = self.shapes.total_values - (1 - self.recipe.share) * dense
        size = values * self._out_itemsize / self.files
        return Work(read=2 * size, write=size)

    def _load(self, call: Called) -> Work:
        (start, stop), *_ = call.arguments
        size = (stop - start) * self.shapes.block_values * self.shapes.itemsize
        return Work(read=float(size))

    def _carried(self, call: Called) -> Work:
        """A chunk that comes from another worker, and one that is stored for the next."""
        comes = self._state if call.takes is not None and call.takes[0] else 0.0
        goes = self._state if call.emits is not None else 0.0
        return Work(network=comes, write=goes)

    def _finish(self) -> Work:
        """All linears of a block."""
        needs, pivoted = needs_of(self.recipe.method), self.recipe.storage == "pivoted"
        return decomposing_block(self.shapes, needs, pivoted, self._out_itemsize)


def _blocks(call: Called) -> int:
    """Of the shard that a call is of, from its label: `blocks 2-3, chunk 17`."""
    _, numbers = call.label.partition(",")[0].split(" ")
    first, _, last = numbers.partition("-")
    return int(last or first) - int(first) + 1
