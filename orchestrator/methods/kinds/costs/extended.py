"""Cost of `linalg.extend`: directions behind the stored ones, up to all K of a weight.

Shape letters as in `base`; F = K - R further directions. The residual is decomposed in float64, and
its factors stay in float64 until they are appended.
"""

from orchestrator.forecast.work import Work, eigen_side
from orchestrator.methods.kinds.costs.low_rank import cutting, eigen, spanning
from orchestrator.methods.kinds.costs.workspaces import EIGENVECTOR_COPIES
from orchestrator.plan.linear import Linear


def extending(linear: Linear, stored: int) -> Work:
    """Return the work of an extension from R = `stored` directions.

    The residual, its square or its moment, an eigendecomposition, the factors, and the error of
    these. A residual of rank F < K has no Cholesky factor, so a tall one takes reflections too.
    """
    outputs, narrow = float(linear.out_features), float(eigen_side(linear))
    further = narrow - stored
    if further <= 0:
        return Work()
    values = float(linear.values)
    residual = 2.0 * values * stored
    is_tall = linear.out_features > linear.in_features
    square = 4.0 * narrow**3 + 4.0 * values * narrow if is_tall else 2.0 * values * narrow
    error = 2.0 * outputs * further**2 + 4.0 * narrow**2 * further
    double = residual + spanning(linear) + square + cutting(linear, further) + error
    return Work(double=double) + eigen(linear)


def extending_bytes(linear: Linear, stored: int, itemsize: int) -> int:
    """Return the peak bytes of an extension beside the weight and the stored factors.

    Args:
        itemsize: Bytes of a value of the weight, which the appended factors have too.
    """
    narrow = eigen_side(linear)
    further, whole, square = narrow - stored, 8 * linear.values, 8 * narrow * narrow
    if further <= 0:
        return 0
    forming = max(3 * whole, 2 * whole + 8 * stored * linear.rank_cost)
    factors = 8 * further * linear.rank_cost
    appending = whole + square + factors + itemsize * (further + narrow) * linear.rank_cost
    if linear.out_features > linear.in_features:
        # the residual and its basis; the Gram, the core and the moment
        turning = 2 * whole + (3 + EIGENVECTOR_COPIES) * square
        # the same without the basis, vectors; a product of factors, and three of the core's size
        measuring = whole + 7 * square + factors + 8 * further * further
    else:
        turning = whole + (1 + EIGENVECTOR_COPIES) * square
        held = whole + 2 * square + factors
        products = square + 8 * narrow * further + 16 * further * further
        measuring = held + max(3 * square, products)
    return max(forming, turning, measuring, appending)
