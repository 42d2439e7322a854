"""Weights and statistics of linears that share a basis, joined to those of one linear.

Shape suffixes: E linears, O outputs, I inputs, K = min of outputs and inputs of the joint weight.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, Statistic


def on_top(
    weights: Sequence[Tensor], statistics: Iterable[Statistic], sites: Sequence[str]
) -> tuple[Tensor, InputGram]:
    """Join linears with a basis of their inputs: [E O, I], with the sum H of their second moments.

    The best basis for H is the best one if all have the same inputs. If not, an error D_e of a
    linear counts by the inputs of all, as `Σ trace(D_e H D_eᵀ)`. Curvatures, sums over the
    gradients of a linear, are blocks of that of the joint outputs; the mean is over the gradients
    of all, so that a linear counts by its use.

    Float64, on the device of the weights. O(E O I²), and O(E O² I) more with curvatures.

    Args:
        weights: [O, I] each.
        statistics: Read one by one, so that memory holds one beside the sums.
        sites: Site of each; inputs of a site are added once.

    Raises:
        ValueError: A statistic is not a Gram of inputs.
    """
    weight = torch.cat(list(weights))
    outputs, inputs = weight.shape
    moment_II, curvature_KK = _zeros(weight, inputs), _zeros(weight, min(outputs, inputs))
    tokens, gradients, start = 0, 0, 0
    seen: set[str] = set()
    for weight_OI, statistic, site in zip(weights, statistics, sites, strict=True):
        gram, stop = _input_gram(statistic), start + len(weight_OI)
        if site not in seen:
            seen.add(site)
            moment_II += gram.matrix_II
            tokens += gram.tokens or 0
        if gram.curvature is not None:
            gradients += gram.curvature.gradients
            own = gram.curvature.matrix_KK.double()
            if outputs <= inputs:
                curvature_KK[start:stop, start:stop] = own
            else:
                wide_OI = weight_OI.double()
                # that of a linear with O > I is turned to its inputs already
                is_turned = len(weight_OI) > inputs
                curvature_KK += own if is_turned else wide_OI.T @ own @ wide_OI
        start = stop
    curvature = Curvature(curvature_KK, gradients) if gradients else None
    return weight, InputGram(moment_II, tokens, None, curvature)


def side_by_side(
    weights: Sequence[Tensor], statistics: Iterable[Statistic]
) -> tuple[Tensor, OutputGram]:
    """Join linears with a basis of their outputs: [O, E I], with the second moment M of all.

    `M = Σ W_e H_e W_eᵀ` decides the basis, H_e the second moment of the inputs of a linear: for
    every rank its leading eigenvectors U are the best one, with factors `Uᵀ W_e`, and eigenvalues
    that are cut are lost. With curvatures, whose sum C = L Lᵀ serves all, so it is for `Lᵀ M L`.

    Float64, on the device of the weights. O(E O I (O + I)).

    Args:
        weights: [O, I] each.
        statistics: Read one by one; curvatures are of the outputs, [O, O].

    Raises:
        ValueError: A statistic is not a Gram of inputs, or a curvature has another size.
    """
    weight = torch.cat(list(weights), dim=1)
    outputs, inputs = weight.shape
    moment_OO, curvature_OO = _zeros(weight, outputs), _zeros(weight, outputs)
    tokens, gradients = 0, 0
    for weight_OI, statistic in zip(weights, statistics, strict=True):
        gram, wide_OI = _input_gram(statistic), weight_OI.double()
        moment_OO += wide_OI @ gram.matrix_II.double() @ wide_OI.T
        tokens += gram.tokens or 0
        if gram.curvature is not None:
            if len(gram.curvature.matrix_KK) != outputs:
                raise ValueError("a basis of outputs needs the curvature of the outputs")
            curvature_OO += gram.curvature.matrix_KK
            gradients += gram.curvature.gradients
    moment_OO = (moment_OO + moment_OO.T) / 2
    if not gradients:
        return weight, OutputGram(moment_OO, tokens)
    wide = weight.double()
    turned_KK = curvature_OO if outputs <= inputs else wide.T @ curvature_OO @ wide
    return weight, OutputGram(moment_OO, tokens, None, Curvature(turned_KK, gradients))


def _input_gram(statistic: Statistic) -> InputGram:
    if not isinstance(statistic, InputGram):
        raise ValueError("linears that share a basis need Grams of inputs; found another statistic")
    return statistic


def _zeros(weight: Tensor, size: int) -> Tensor:
    return torch.zeros(size, size, dtype=torch.float64, device=weight.device)
