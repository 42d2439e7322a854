"""Closed gains of kept directions: the optimum of a cut's loss, and the cases in which it is 1."""

import pytest
import torch
from matrices import gaussian

from orchestrator.errors import InputError
from orchestrator.linalg.gains import closed_gains
from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.linalg.two_sided import decompose_two_sided

OUTPUTS, INPUTS = 7, 9


def moment(size, seed, rank=None):
    """A second moment [size, size] of correlated rows."""
    rows_TN = gaussian(rank or 3 * size, size, seed=seed) @ gaussian(size, size, seed=seed + 1)
    return rows_TN.T @ rows_TN


def cut(left_OR, right_RI, kept):
    """Kept factors, and what the other directions hold."""
    others = [index for index in range(len(right_RI)) if index not in kept]
    return left_OR[:, kept], right_RI[kept], left_OR[:, others] @ right_RI[others]


def singular_directions(weight_OI):
    left_OR = torch.linalg.svd(weight_OI, full_matrices=False)[0]
    return left_OR, left_OR.T @ weight_OI


def loss(gains_K, left_OK, right_KI, lost_OI, gram_II, curvature_OO):
    error_OI = lost_OI + left_OK @ torch.diag(1 - gains_K) @ right_KI
    return torch.trace(curvature_OO @ error_OI @ gram_II @ error_OI.T)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kept", [[0, 1, 2], [4], [6, 0, 5, 2]])
def test_gains_are_the_optimum_of_the_loss(kept, rank):
    """The loss that a numerical optimiser reaches from 1, to 1e-9 of it, for factors of any cut, a
    Gram without full rank too; and a gradient of 0 at the gains."""
    weight_OI = gaussian(OUTPUTS, INPUTS, seed=0)
    gram_II, curvature_OO = moment(INPUTS, 1, rank), moment(OUTPUTS, 3)
    left_OK, right_KI, lost_OI = cut(*singular_directions(weight_OI), kept)
    given = left_OK, right_KI, lost_OI, gram_II, curvature_OO
    found_K = closed_gains(*given[:3], gram_II=gram_II, curvature_OO=curvature_OO)
    searched_K = torch.ones(len(kept), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [searched_K], max_iter=500, tolerance_grad=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(searched_K, *given)
        value.backward()
        return value

    optimizer.step(closure)
    least, found = float(loss(searched_K.detach(), *given)), float(loss(found_K, *given))
    uncorrected = float(loss(torch.ones_like(found_K), *given))
    assert found <= least * (1 + 1e-12)
    assert found == pytest.approx(least, rel=1e-9)
    assert found < uncorrected
    at_found_K = found_K.clone().requires_grad_()
    loss(at_found_K, *given).backward()
    assert float(at_found_K.grad.abs().max()) < 1e-9 * uncorrected


@pytest.mark.parametrize("seed", range(3))
def test_gains_are_1_for_orthonormal_directions_of_any_gram(seed):
    """Without a curvature the outputs along a direction come from it alone; a Gram of two rows, and
    directions of energy 1e-12, change nothing."""
    weight_OI = gaussian(OUTPUTS, INPUTS, seed=seed)
    left_OR, right_RI = singular_directions(weight_OI)
    right_RI = torch.logspace(0, -6, OUTPUTS, dtype=torch.float64)[:, None] * right_RI
    for gram_II in (moment(INPUTS, seed), moment(INPUTS, seed, rank=2)):
        given = cut(left_OR, right_RI, [0, 2, 6])
        found_K = closed_gains(*given, gram_II=gram_II)
        torch.testing.assert_close(found_K, torch.ones_like(found_K), rtol=0, atol=1e-8)
        eye = closed_gains(*given, gram_II=gram_II, curvature_OO=torch.eye(OUTPUTS))
        torch.testing.assert_close(eye, found_K, rtol=0, atol=1e-12)


def test_gains_of_two_sided_factors_are_1():
    """Their directions are orthogonal on both sides: for the damped curvature with any Gram, and
    for the Gram with any curvature; only if both are others do gains lower the loss."""
    weight_OI, gram_II = gaussian(OUTPUTS, INPUTS, seed=0), moment(INPUTS, 1)
    curvature_OO, damping = moment(OUTPUTS, 3), 0.1
    statistic = InputGram(gram_II, 100, curvature=Curvature(curvature_OO, 100))
    made = decompose_two_sided(weight_OI, statistic, OUTPUTS, damping=damping)
    eye_OO = torch.eye(OUTPUTS, dtype=torch.float64)
    damped_OO = curvature_OO + damping * curvature_OO.diagonal().mean() * eye_OO
    for kept in ([0, 1, 2], [1, 4, 6]):
        given = cut(made.weight_OR, made.down_RI, kept)
        one_K, other_II = torch.ones(len(kept), dtype=torch.float64), moment(INPUTS, 5)
        for about in ((gram_II, damped_OO), (other_II, damped_OO), (gram_II, curvature_OO)):
            found_K = closed_gains(*given, gram_II=about[0], curvature_OO=about[1])
            torch.testing.assert_close(found_K, one_K, rtol=0, atol=1e-9)
        about = *given, other_II, curvature_OO
        found_K = closed_gains(*given, gram_II=other_II, curvature_OO=curvature_OO)
        assert float(loss(found_K, *about)) < 0.999 * float(loss(one_K, *about))


def test_directions_without_loss_keep_gain_1():
    """A direction of zeros, and inputs that never occur, are not divided by."""
    left_OR, right_RI = singular_directions(gaussian(OUTPUTS, INPUTS, seed=0))
    right_RI[1] = 0
    given = cut(left_OR, right_RI, [0, 1, 2])
    found_K = closed_gains(*given, gram_II=moment(INPUTS, 1), curvature_OO=moment(OUTPUTS, 3))
    assert float(found_K[1]) == 1
    assert float((found_K - 1).abs().max()) > 1e-3
    unseen_K = closed_gains(*given, gram_II=torch.zeros(INPUTS, INPUTS))
    assert torch.equal(unseen_K, torch.ones_like(unseen_K))
    with pytest.raises(InputError, match="lost"):
        closed_gains(*given[:2], given[2] / 0, gram_II=moment(INPUTS, 1))
