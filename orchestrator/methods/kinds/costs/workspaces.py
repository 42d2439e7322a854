"""Peak bytes of decompositions to factors, derived from `linalg` line by line.

Shape letters as in `base`. A decomposition works in float64 (8 bytes) and returns factors in
float32. A test compares the bytes with those of the tensors that are alive together.
"""

from orchestrator.plan.linear import Linear

EIGENVECTOR_COPIES = 4
"""[K, K] matrices of an eigendecomposition beside its argument: vectors, and LAPACK's or
cuSOLVER's workspace by divide and conquer, 1 + 6 K + 2 K^2 numbers, with the copy it works on."""


def _column_space(linear: Linear, side: int) -> tuple[int, int, int]:
    """Bytes that stay of a weight's basis and core, and the peak until the moment is formed."""
    outputs, inputs = linear.out_features, linear.in_features
    narrow = min(outputs, inputs)
    whole, square = 8 * outputs * inputs, 8 * narrow * narrow
    basis, core = (whole, square) if outputs > inputs else (0, whole)
    # the weight in float64, its square, a factor of it, and a solution
    finding = 2 * whole + 2 * square if basis else whole
    forming = 8 * narrow * inputs if side == inputs else basis
    return basis, core, max(finding, basis + core + forming + square)


def _completing(linear: Linear, free: int) -> int:
    """Bytes for the directions that the Gram leaves free, in which the weight is decomposed."""
    narrow, inputs = min(linear.out_features, linear.in_features), linear.in_features
    square = 8 * free * free
    turned = 8 * narrow * narrow + 8 * narrow * free
    return 8 * free * inputs + max((1 + EIGENVECTOR_COPIES) * square, turned) if free else 0


def one_sided(linear: Linear, rank: int, side: int, free: int) -> int:
    """Peak bytes of `linalg.low_rank` beside the statistic, line by line.

    Args:
        side: Channels of the Gram.
        free: Directions that the Gram leaves open.
    """
    outputs, inputs = linear.out_features, linear.in_features
    narrow = min(outputs, inputs)
    square = 8 * narrow * narrow
    basis, core, spanning = _column_space(linear, side)
    turning = basis + core + square + EIGENVECTOR_COPIES * square
    completing = basis + core + 2 * square + _completing(linear, free)
    factors, cut = 4 * rank * linear.rank_cost, 4 * narrow * rank
    casting = (
        basis + core + square + cut + max(basis // 2 + 4 * outputs * rank, factors + core // 2)
    )
    measuring = core + square + cut + factors
    if side == inputs and inputs < 2 * narrow:
        measuring += 4 * rank * rank + 3 * 4 * narrow * inputs + 4 * inputs * inputs
    else:
        measuring += 2 * square + 8 * rank * (outputs + 2 * narrow) + 2 * 8 * rank * rank
    return max(spanning, turning, completing, casting, measuring)


def two_sided(linear: Linear, rank: int, side: int, free: int) -> int:
    """Peak bytes of `linalg.two_sided` beside the statistics, line by line; see `one_sided`."""
    outputs, inputs = linear.out_features, linear.in_features
    narrow = min(outputs, inputs)
    square = 8 * narrow * narrow
    basis, core, spanning = _column_space(linear, side)
    reducing = basis + core + 6 * square
    # moment and factor of the curvature, then their product and its eigenvectors
    turning = basis + core + (2 + 1 + EIGENVECTOR_COPIES) * square
    completing = basis + core + 3 * square + 8 * narrow * inputs + _completing(linear, free)
    factors, cut = 4 * rank * linear.rank_cost, 8 * narrow * rank
    held = core + 2 * square + 2 * cut + factors
    rounding = basis + held + 8 * outputs * rank + (cut if basis else 0)
    losing = held + 2 * cut + max(square + 2 * cut, 3 * 8 * rank * rank)
    explaining = held - square + square + cut + 3 * 8 * rank * rank
    return max(spanning, reducing, turning, completing, rounding, losing, explaining)
