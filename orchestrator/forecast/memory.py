"""Bytes that a worker holds at its worst, stage by stage, read off what the code keeps alive.

Shape letters: O outputs, I inputs, K = min(O, I), R the rank that is stored, T tokens of a
sequence. A decomposition works in float64 (8 bytes) and returns factors in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.forecast.needs import (
    Needs,
    curvature_channels,
    curvatures,
    gram_of,
    input_grams,
)
from orchestrator.forecast.shapes import Shapes
from orchestrator.plan import Linear

GRAM_BYTES = 12
"""Of an entry: a float64 sum and a float32 one."""
REFINED_BYTES = 24
"""Of a refined parameter: value, gradient, that of a slice, two moments, the best state."""
TRAINED_BYTES: Mapping[str, int] = {"all": 16, "lean": 12, "light": 8}
"""Of a parameter of the trained model; `light` holds W0 and W of the left factors."""
PROCESS_BYTES = 100_000_000
"""What no shard decides: modules imported late, small buffers that were freed and kept. Measured
0.1 to 0.2 GB of a worker without a GPU, above what it holds before its first call."""
BAND = 256
"""Rows at a time in which a pivoted product is compared (`linalg.pivot`, which imports torch)."""
MOMENT_BYTES = 56
"""Of a squared channel: three moments of two streams while they are summed and read out."""
EIGENVECTOR_COPIES = 4
"""[K, K] matrices that an eigendecomposition has beside its argument: vectors, and LAPACK's or
cuSOLVER's workspace by divide and conquer, 1 + 6 K + 2 K^2 numbers, with the copy it works on."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What is in memory at the worst moment of a stage, by what it is; bytes."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def calibration(
    shapes: Shapes,
    needs: Needs,
    blocks: int,
    *,
    tokens: int,
    sequences: int,
    itemsize: int,
    pivoted: bool,
) -> Footprint:
    """Of a shard of so many blocks, while chunks pass or a block is finished.

    Grams are there from the first chunk on; a linear's is let go once it is decomposed, so the
    worst moment is found by going through one block, the heaviest.

    Args:
        tokens: Of a sequence.
        sequences: All together; what fewer tokens than ranks leave open is made up.
        itemsize: Bytes of a value in the passes.
    """
    linears = shapes.heaviest
    grams = input_grams(linears, needs)
    bends = curvatures(linears, needs)
    held = blocks * GRAM_BYTES * sum(n * n for n in [*grams.values(), *bends.values()])
    weights = {
        "process": PROCESS_BYTES,
        "weights": blocks * shapes.block_values * itemsize,
        "embeddings": shapes.front_values * itemsize,
    }
    backward = needs.labels > 0
    activations = _activations(shapes, tokens, itemsize, blocks if backward else 1)
    logits = 3 * 4 * tokens * shapes.vocabulary if backward else 0
    passing = Footprint({**weights, "Grams": held, "activations": activations + logits})
    return max(
        [
            passing,
            *_finishing(
                linears, needs, grams, weights, held, pivoted, shapes.itemsize, tokens * sequences
            ),
        ],
        key=lambda each: each.total,
    )


def _finishing(
    linears: Sequence[Linear],
    needs: Needs,
    grams: Mapping[str, int],
    weights: Mapping[str, int],
    held: int,
    pivoted: bool,
    stored_itemsize: int,
    known: int,
) -> list[Footprint]:
    """While each linear of the first block is decomposed, the one before it being written."""
    found = []
    before = 0
    for place, linear in enumerate(linears):
        source = gram_of(linear, grams)
        side = linear.in_features if source == linear.site else linear.out_features
        whole = needs.stacked(linear)
        # Grams of a group are read out together and summed
        summed = 8 * side * side * (whole.out_features // linear.out_features - 1)
        working = decomposition(whole, needs, side, pivoted, known) + summed
        found.append(
            Footprint({**weights, "Grams": held, "decomposition": working, "written": before})
        )
        # as they are stored, for the disk
        before = stored_itemsize * stored_rank(whole, needs, pivoted) * whole.rank_cost
        later = {gram_of(each, grams) for each in linears[place + 1 :]}
        if source not in later:
            held -= GRAM_BYTES * grams[source] ** 2
        if needs.labels:
            held -= GRAM_BYTES * curvature_channels(linear, needs) ** 2
    return found


def stored_rank(linear: Linear, needs: Needs, pivoted: bool) -> int:
    """The rank up to which factors are stored."""
    if needs.kind in ("sparse",):
        return 0
    narrow = min(linear.out_features, linear.in_features)
    return narrow if pivoted or needs.kind == "rpca" else max(linear.break_even, 1)


def decomposition(
    linear: Linear, needs: Needs, side: int, pivoted: bool, known: int | None = None
) -> int:
    """At the worst moment of decomposing one linear, its statistics read out included.

    Args:
        side: Channels of its Gram.
        known: The largest rank that its Gram can have, if less than all.
    """
    outputs, inputs = linear.out_features, linear.in_features
    narrow = min(outputs, inputs)
    rank = stored_rank(linear, needs, pivoted)
    whole, square = 8 * outputs * inputs, 8 * narrow * narrow
    reading = 3 * 8 * side * side
    statistic = 8 * side * side
    if needs.kind == "sparse":
        # scores, their order, and positions of all entries
        return max(reading, statistic + 4 * whole)
    if needs.kind == "rpca":
        # weight, L, S, the multiplier and two iterates, and a Gram's eigenvectors
        splitting = 7 * whole + (2 + EIGENVECTOR_COPIES) * square
        # factors and entries, beside the inputs' Gram scaled and its Cholesky factor
        sketching = 4 * rank * linear.rank_cost + whole + 2 * 8 * side * side
        return max(reading, statistic + max(splitting, sketching))
    tall = outputs > inputs
    space = whole + (whole + square if tall else 0)
    factors = 4 * rank * linear.rank_cost
    # directions that the Gram does not know go by the weight, whose part in them is decomposed
    free = max(narrow - known, 0) if known is not None and known < rank else 0
    completing = 2 * square + 8 * free * inputs + 8 * (1 + EIGENVECTOR_COPIES) * free * free
    if needs.kind == "low_rank":
        forming = whole if side == inputs else 0
        turning = (1 + EIGENVECTOR_COPIES) * square
        halves = whole // 2
        measuring = 2 * square + factors + 4 * narrow * rank
        if side == inputs and inputs < 2 * narrow:
            measuring += 2 * halves + 4 * inputs * inputs + 4 * rank * rank
        else:
            measuring += square + 8 * rank * (outputs + 2 * narrow) + 16 * rank * rank
        moments = [forming + square, turning, 2 * square + factors + halves, measuring]
        moments += [completing] if free else []
        return max(reading, statistic + space + max(moments))
    # both sides: moment, curvature, its factor, and products of these with the weight
    channels = curvature_channels(linear, needs)
    statistic += 8 * channels * channels
    core = 8 * narrow * inputs
    turning = core + (4 + 1 + EIGENVECTOR_COPIES) * square
    measuring = core + 6 * square + 8 * rank * (outputs + 5 * narrow) + 2 * factors
    working = (
        statistic + space + max(turning, measuring, core + 4 * square + completing * (free > 0))
    )
    if needs.kind == "two_sided_sparse":
        # entries, their order, the damped curvature, and the correlations of both sides
        working += 4 * whole + 8 * channels**2 + channels**2 + inputs**2
    return max(reading, working)


def _activations(shapes: Shapes, tokens: int, itemsize: int, blocks: int) -> int:
    """Of one sequence: what a pass forward has at once, or what a pass back keeps of all blocks."""
    widest = max(each.out_features for each in shapes.heaviest)
    states = 24 * shapes.hidden + itemsize * (6 * shapes.hidden + 3 * shapes.attention + 3 * widest)
    gram_rows = 4 * max(each.in_features for each in shapes.heaviest)
    return tokens * (states * blocks + gram_rows)


def pivoting(shapes: Shapes, kept: float, itemsize: int) -> Footprint:
    """Of the linear whose factors take most to be brought to pivoted storage."""
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "pivoting": max(
                (_pivoting(each, kept, itemsize) for each in shapes.linears), default=0
            ),
        }
    )


def _pivoting(linear: Linear, kept: float, itemsize: int) -> int:
    """The factors as stored, and an orthonormal basis being made, or the result being compared."""
    each = replace(linear, pivoted=True)
    outputs, inputs = each.out_features, each.in_features
    rank = each.rank_within(int(kept * each.values))
    choosing = 5 * outputs * rank
    comparing = 3 * rank * inputs + outputs * rank + 6 * BAND * inputs
    return 2 * itemsize * rank * each.rank_cost + 8 * max(choosing, comparing)


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
    """Of one block that is refined behind a dense shard, with the chunks at all its boundaries."""
    states = (blocks + 1) * tokens * sequences * shapes.hidden * itemsize
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "training state": trained_block(shapes, kept, even, REFINED_BYTES),
            "dense shard": (blocks * shapes.block_values + shapes.front_values) * itemsize,
            "inputs and targets": states,
            "activations": _activations(shapes, tokens, 4, 1),
        }
    )


def trained_block(shapes: Shapes, kept: float, even: bool, each: int) -> int:
    """A block with its trained factors at so many bytes a value, the rest in float32.

    Where sizes are not even a block may keep all of its values; then that counts.

    Args:
        even: Whether every block keeps the same share.
    """
    targeted = sum(linear.values for linear in shapes.heaviest)
    trained = int((kept if even else 1.0) * targeted)
    return each * trained + 4 * (shapes.block_values - targeted)


def walking(
    shapes: Shapes,
    kept: float,
    even: bool,
    *,
    tokens: int,
    sequences: int,
    itemsize: int,
    lent: int,
    compensates: bool,
    refines: bool,
) -> Footprint:
    """Of a block of both models, with the dense stream on both its sides and the compressed one.

    Args:
        lent: Workers that share a block, and the compressed stream behind it.
        compensates: Whether moments of both streams are taken, site by site.
        refines: Whether the block is trained.
    """
    state = tokens * sequences * shapes.hidden
    solving = max(
        max(MOMENT_BYTES * each.in_features**2, 32 * each.in_features**2 + 32 * each.values)
        for each in shapes.heaviest
    )
    training = trained_block(shapes, kept, even, REFINED_BYTES if refines else 4)
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "dense block": (shapes.block_values + shapes.front_values) * itemsize,
            "compressed block": 4 * shapes.front_values + training,
            "streams": int(state * (2 * itemsize + 4 + 4 / lent)),
            "moments": solving if compensates else 0,
            "activations": _activations(shapes, tokens, 4, 1),
        }
    )


def refitting(shapes: Shapes, blocks: int, *, tokens: int, itemsize: int) -> Footprint:
    """Of a shard of the cut model whose left factors are fitted to the inputs that they get."""
    sites = {linear.site: linear.in_features for linear in shapes.heaviest}
    largest = max(linear.values for linear in shapes.heaviest)
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "weights": blocks * shapes.block_values * itemsize,
            "embeddings": shapes.front_values * itemsize,
            "Grams": blocks * GRAM_BYTES * sum(n * n for n in sites.values()),
            "activations": _activations(shapes, tokens, itemsize, 1),
            "fit": 3 * 8 * max(n * n for n in sites.values()) + 3 * 8 * largest,
        }
    )


def training(
    shapes: Shapes,
    kept: float,
    even: bool,
    mode: str,
    workers: int,
    *,
    tokens: int,
    stored_targets: bool,
) -> Footprint:
    """Of the shard of one of so many workers, which between them hold the whole model."""
    blocks = -(-shapes.num_blocks // workers)
    # over many blocks sizes even out
    trained = trained_block(shapes, kept, even or blocks > 2, TRAINED_BYTES[mode])
    ends = 4 * max(shapes.front_values, shapes.head_values)
    dense = 0 if stored_targets else blocks * shapes.block_values * 4
    logits = 4 * 4 * tokens * shapes.vocabulary
    between = 4 * tokens * shapes.hidden * (blocks + 2 * workers)
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "training state": blocks * trained,
            "embeddings or head": ends,
            "dense copy": dense,
            "activations": _activations(shapes, tokens, 4, 1) + logits + between,
        }
    )


def writing(shapes: Shapes) -> Footprint:
    """Of a worker that writes: one linear at a time, cut and cast."""
    largest = max((each.values for each in shapes.linears), default=0)
    return Footprint(
        {"process": PROCESS_BYTES, "one linear": 8 * largest + 4 * shapes.front_values}
    )
