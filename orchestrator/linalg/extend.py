"""Further directions of a weight behind those that are stored, up to the whole of it.

Shape suffixes: O outputs, I inputs, R stored directions, K = min(O, I).
"""

import torch
from torch import Tensor

from orchestrator.linalg.low_rank import InputGram, OutputGram, Statistic, decompose


def extend_directions(
    weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor
) -> tuple[Tensor, Tensor]:
    """Extend the product U D of R directions to K directions, whose product is W.

    The further ones are the K - R leading singular directions of W - U D, of descending singular
    values. If U D = P W for a projection P to R of the dimensions that W spans, as of every method
    that stores factors, W - U D has rank K - R at most and the remainder is 0; if it is the
    truncated SVD of W, they are the rest of that SVD. Of factors that were rounded some rounding
    is left.

    The factors come in the dtype of W and on its device; bits follow from the arguments, the device
    and the number of threads. O(O I K + K^3).

    Raises:
        InputError: A value is NaN or infinite.
    """
    outputs, inputs = weight_OI.shape
    further = min(outputs, inputs) - len(right_RI)
    if further <= 0:
        return left_OR, right_RI
    left_OI = weight_OI.double() - left_OR.double() @ right_RI.double()
    statistic: Statistic
    if outputs <= inputs:
        statistic = OutputGram(left_OI @ left_OI.T)
    else:
        statistic = InputGram(torch.eye(inputs, dtype=left_OI.dtype, device=left_OI.device))
    found = decompose(left_OI, statistic, further)
    return (
        torch.cat([left_OR, found.weight_OR.to(left_OR)], dim=1),
        torch.cat([right_RI, found.down_RI.to(right_RI)]),
    )
