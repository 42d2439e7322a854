"""Peak bytes of a decomposition, derived from `linalg` line by line.

Shape letters as in `memory`. A decomposition works in float64 (8 bytes) and returns factors in
float32. A test compares them with the tensors that are alive together.
"""

from orchestrator.forecast.needs import Needs, curvature_channels
from orchestrator.plan.linear import Linear

EIGENVECTOR_COPIES = 4
"""[K, K] matrices of an eigendecomposition beside its argument: vectors, and LAPACK's or
cuSOLVER's workspace by divide and conquer, 1 + 6 K + 2 K^2 numbers, with the copy it works on."""


def reading(linear: Linear, needs: Needs, side: int) -> int:
    """Bytes while a linear's statistics are read from their Grams, one triangle at a time."""
    gram = 8 * side * side
    curvature = 8 * curvature_channels(linear, needs) ** 2 if needs.labels else 0
    return max(2 * gram, gram + 2 * curvature)


def decomposing(
    linear: Linear, needs: Needs, side: int, rank: int, *, known: int | None = None
) -> int:
    """Peak bytes while a linear is decomposed to a rank, with the copies of its statistics.

    Args:
        side: Channels of its Gram.
        known: The largest rank that its Gram can have, if less than all.
    """
    outputs, inputs = linear.out_features, linear.in_features
    narrow = min(outputs, inputs)
    whole, square = 8 * outputs * inputs, 8 * narrow * narrow
    statistic = 8 * side * side
    if needs.kind == "sparse":
        # scores, positions, the stored part of both, and in float32 the residual and its image
        return statistic + statistic // 2 + 4 * whole + whole // 2
    if needs.kind == "rpca":
        # weight, L, S, the multiplier and two iterates, and a Gram's eigenvectors
        splitting = 7 * whole + (2 + EIGENVECTOR_COPIES) * square
        # factors and entries, beside the inputs' Gram scaled and its Cholesky factor
        sketching = 4 * rank * linear.rank_cost + whole + 2 * 8 * side * side
        return statistic + max(splitting, sketching)
    free = max(narrow - known, 0) if known is not None and known < rank else 0
    if needs.kind == "low_rank":
        statistic += square if needs.is_scaled else 0
        return statistic + _one_sided(linear, rank, side, free)
    # both sides: with the curvature
    channels = curvature_channels(linear, needs)
    statistic += 8 * channels * channels
    working = statistic + _two_sided(linear, rank, side, free)
    if needs.kind == "two_sided_sparse":
        # entries, their order, the damped curvature, and the correlations of both sides
        working += 4 * whole + 8 * channels**2 + channels**2 + inputs**2
    return working


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


def _one_sided(linear: Linear, rank: int, side: int, free: int) -> int:
    """Peak bytes of `linalg.low_rank` beside the statistic, line by line."""
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


def _two_sided(linear: Linear, rank: int, side: int, free: int) -> int:
    """Peak bytes of `linalg.two_sided` beside the statistics, line by line."""
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
