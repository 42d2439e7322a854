"""Bytes that a worker holds at its worst, stage by stage, read off what the code keeps alive.

Shape letters: O outputs, I inputs, K = min(O, I), R the rank that is stored, T tokens of a
sequence. Stages count the process and all its tensors, as on a CPU; `on_gpu` gives the part on a
device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.statistics import (
    BlockStatistics,
    KeptRows,
    joint_linears,
    kept_rows,
    method_statistics,
)
from orchestrator.methods.base import Method
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.plan.experts import GRAM_BYTES, expert_groups

SETTLED_BYTES = 8
"""Bytes of a Gram's entry once all chunks have passed: the float64 sum."""
REFINED_BYTES = 24
"""Bytes of a refined parameter: value, gradient, gradient of a slice, two moments, best state.
AdamW adds no temporaries: it is fused on CUDA, and on a CPU takes one parameter at a time."""
PROCESS_BYTES = 100_000_000
"""Bytes that depend on no shard: modules imported late, freed buffers that are kept. Measured
0.1 to 0.2 GB of a worker without a GPU, above what it holds before its first call."""
CONTEXT_BYTES = 1_000_000_000
"""Bytes of a GPU outside of torch's allocator: CUDA context, kernels and handles of cuBLAS and
cuSOLVER. Processes without cuSOLVER are reported with 0.4 to 0.5 GB (out of memory errors of torch
on L40S, RTX 4090, A100); with it 0.6 to 1 GB are expected, not measured."""
FRAGMENTATION = 0.05
"""Fraction of a GPU's tensors that torch's allocator reserves beyond them in expandable segments;
expected, not measured."""
HOST_PARTS = ("process", "written")
"""Parts of a footprint in host memory if the worker has a GPU: tensors are copied there before they
are written."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Peak memory of a stage: bytes by content."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def calibration(
    shapes: Shapes,
    method: Method,
    blocks: int,
    *,
    tokens: int,
    sequences: int,
    itemsize: int,
    pivoted: bool,
    gpu: bool = False,
    groups: int = 1,
) -> Footprint:
    """Footprint of a shard while chunks pass or a block is finished.

    Grams exist from the first chunk on, and each is freed as its linear is decomposed, so the peak
    is found by going through the heaviest block. Rows of experts are freed with the last linear
    that a Gram is made of them for.

    Args:
        tokens: Tokens of a sequence.
        sequences: All sequences; directions beyond their tokens are completed without a Gram.
        itemsize: Bytes of a value in the passes.
        gpu: True if the worker has a GPU; the peak is then that of its memory.
        groups: Groups of experts, whose statistics are gathered one after the other.
    """
    known, backward = tokens * sequences, method.label_draws > 0
    weights = {"process": PROCESS_BYTES, "weights": blocks * shapes.block_values * itemsize}
    activations = activation_bytes(shapes, tokens, itemsize, blocks if backward else 1)
    logits = 3 * 4 * tokens * shapes.vocabulary if backward else 0
    moments: list[dict[str, int]] = []
    for linears in expert_groups(shapes.heaviest, frozenset(shapes.experts), groups):
        statistics = method_statistics(linears, method)
        rows = kept_rows(shapes, statistics, known, itemsize)
        moments.append(
            {
                **weights,
                "embeddings": shapes.front_values * itemsize,
                "Grams": GRAM_BYTES * blocks * (statistics.entries - rows.entries)
                + blocks * _gradients(statistics, settled=False),
                **rows.part(blocks * rows.size),
                "activations": activations
                + logits
                + blocks * statistics.paired_bytes(tokens, itemsize)
                + statistics.basis_bytes,
            }
        )
        held = _Held(shapes, method, statistics, rows, blocks)
        about: dict[str, Any] = {"itemsize": itemsize, "pivoted": pivoted, "known": known}
        moments += [{**weights, **each} for each in _finishing(held, **about)]
    footprints = [Footprint(each) for each in moments]
    return max(footprints, key=lambda each: (on_gpu(each) if gpu else each).total)


def on_gpu(found: Footprint) -> Footprint:
    """The part of a footprint on a GPU, with the memory of CUDA and of torch's allocator."""
    tensors = {name: size for name, size in found.parts.items() if name not in HOST_PARTS}
    unused = int(FRAGMENTATION * sum(tensors.values()))
    return Footprint({"context": CONTEXT_BYTES, **tensors, "fragmentation": unused})


@dataclass(frozen=True, slots=True)
class _Held:
    """Statistics of one pass through a shard."""

    shapes: Shapes
    method: Method
    statistics: BlockStatistics
    rows: KeptRows
    blocks: int


def _finishing(
    held: _Held, *, itemsize: int, pivoted: bool, known: int
) -> Iterator[dict[str, int]]:
    """Footprints while a linear of the first block is decomposed and the previous one written.

    Embeddings and float32 sums are freed by then. A Gram is freed once the last linear that needs
    it has its copy. Sums over all experts of the block are there for those with few tokens.

    Args:
        known: The largest rank that a Gram can have.
    """
    shapes, method, statistics, rows = held.shapes, held.method, held.statistics, held.rows
    linears, cost, written = statistics.linears, method.kind.cost, 0
    paired = held.blocks * _gradients(statistics, settled=True)
    entries, kept = held.blocks * (statistics.entries - rows.entries), held.blocks * rows.size
    last = {statistics.source(each): place for place, each in enumerate(linears)}
    end_of_rows = max((last[each] for each in rows.sources), default=-1)
    pools = sum(n * n for n in statistics.pools(shapes).values())
    joint = joint_linears(linears, method.grouping)
    for place, linear in enumerate(linears):
        source, given = statistics.source(linear), statistics.of(linear)
        whole = joint[linear.name]
        # Grams of a group are read together and summed, its weights joined to one matrix; those of
        # experts are read one by one
        others = whole.values // linear.values - 1
        read = min(others, 1) if linear.experts else others
        summed = 8 * given.gram**2 * read + (itemsize * whole.values if others else 0)
        # one that is made of rows is there from the first linear that needs it
        made = rows.sources.get(source, 0) ** 2
        yield {
            "written": written,
            **rows.part(kept),
            "Grams": SETTLED_BYTES * (entries + made + pools) + paired,
            "decomposition": _reading(given) + summed,
        }
        if last[source] == place:
            entries -= 0 if made else given.gram**2
            made = 0
        kept -= rows.size if place == end_of_rows else 0
        entries -= given.curvature**2
        paired -= statistics.gradient_bytes(linear, settled=True)
        rank = cost.stored_rank(whole, pivoted=pivoted)
        working = cost.workspace(whole, statistics.of(whole, known), rank) + summed
        yield {
            "written": written,
            **rows.part(kept),
            "Grams": SETTLED_BYTES * (entries + made + pools) + paired,
            "decomposition": working,
        }
        written = cost.stored_bytes(whole, pivoted=pivoted, itemsize=shapes.itemsize)


def _gradients(statistics: BlockStatistics, *, settled: bool) -> int:
    """Bytes of the gradients by weights or directions of a block."""
    return sum(statistics.gradient_bytes(each, settled=settled) for each in statistics.linears)


def _reading(given: LinearStatistics) -> int:
    """Bytes while a linear's statistics are read from their Grams, one triangle at a time."""
    gram, curvature = 8 * given.gram**2, 8 * given.curvature**2
    return max(2 * gram, gram + 2 * curvature)


def activation_bytes(shapes: Shapes, tokens: int, itemsize: int, blocks: int) -> int:
    """Peak activations of one sequence in a forward pass, or of all blocks in a backward pass."""
    widest = max(each.out_features for each in shapes.heaviest)
    states = 24 * shapes.hidden + itemsize * (6 * shapes.hidden + 3 * shapes.attention + 3 * widest)
    gram_rows = 4 * max(each.in_features for each in shapes.heaviest)
    return tokens * (states * blocks + gram_rows)


def trained_block(shapes: Shapes, kept: float, even: bool, each: int) -> int:
    """Bytes of a block with trained factors, at `each` bytes a value, and the rest in float32.

    If sizes are not even, a block may keep all of its values, and that is counted.

    Args:
        even: True if every block keeps the same fraction.
    """
    targeted = sum(linear.values for linear in shapes.heaviest)
    trained = int((kept if even else 1.0) * targeted)
    return each * trained + 4 * (shapes.block_values - targeted)


def writing(shapes: Shapes) -> Footprint:
    """Footprint of a worker that writes: one linear at a time, cut and cast."""
    largest = max((each.values for each in shapes.linears), default=0)
    return Footprint(
        {"process": PROCESS_BYTES, "one linear": 8 * largest + 4 * shapes.front_values}
    )
