"""Gains of kept directions: those of one linear in closed form, and the training that finds them.

E = W - U diag(g) D has the loss trace(C E H Eᵀ); L = W - U D is what the cut has lost.
"""

import pytest
import torch
from matrices import gaussian

from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.linalg.two_sided import decompose_two_sided
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.models.training.polarised import DirectionGains, final_gates

OUTPUTS, INPUTS = 7, 9
KEPT = [0, 2, 5]


def moment(size, seed, rank=None):
    """A second moment [size, size] of correlated rows."""
    rows_TN = gaussian(rank or 3 * size, size, seed=seed) @ gaussian(size, size, seed=seed + 1)
    return rows_TN.T @ rows_TN / len(rows_TN)


def cut(left_OR, right_RI):
    """Kept factors, and what the other directions hold."""
    others = [index for index in range(len(right_RI)) if index not in KEPT]
    return left_OR[:, KEPT], right_RI[KEPT], left_OR[:, others] @ right_RI[others]


def singular_directions(weight_OI):
    left_OR = torch.linalg.svd(weight_OI, full_matrices=False)[0]
    return left_OR, left_OR.T @ weight_OI


def loss(gains_K, left_OK, right_KI, lost_OI, gram_II, curvature_OO):
    error_OI = lost_OI + left_OK @ torch.diag(1 - gains_K) @ right_KI
    return torch.trace(curvature_OO @ error_OI @ gram_II @ error_OI.T)


def closed_gains(left_OK, right_KI, lost_OI, gram_II, curvature_OO):
    """Compute the minimiser of the loss, quadratic in g: 1 + M⁻¹ b with the moment of directions
    M_ij = (u_iᵀ C u_j)(D_i H D_jᵀ) and b_i = u_iᵀ C L H D_iᵀ."""
    dual_OK, mapped_KI = curvature_OO @ left_OK, right_KI @ gram_II
    moment_KK = (left_OK.T @ dual_OK) * (right_KI @ mapped_KI.T)
    lost_K = ((dual_OK.T @ lost_OI) * mapped_KI).sum(dim=1)
    return 1 + torch.linalg.solve(moment_KK, lost_K)


def test_trained_gains_come_to_those_in_closed_form():
    """From the gates of the learning: open ones where they are, and a closed one from 1. They lower
    the loss of singular directions, which are orthogonal for neither C nor H."""
    weight_OI = gaussian(OUTPUTS, INPUTS, seed=0)
    given = *cut(*singular_directions(weight_OI)), moment(INPUTS, 1), moment(OUTPUTS, 3)
    expected_K = closed_gains(*given)
    assert 0.01 < float((expected_K - 1).abs().max()) < 1
    least, whole = loss(expected_K, *given), loss(torch.ones_like(expected_K), *given)
    assert float(least) < 0.999 * float(whole)
    gated = GatedLowRankLinear(given[0].float(), given[1].float())
    gains = DirectionGains(gated, torch.tensor([1.5, 0.2, 0.7]))
    torch.testing.assert_close(gated.gates_R.detach(), torch.tensor([1.5, 1.0, 0.7]))
    identity_II = torch.eye(INPUTS)
    for step in range(1, 401):
        error_OI = weight_OI - gated(identity_II).T
        torch.trace(given[4] @ error_OI @ given[3] @ error_OI.T).backward()
        gains.update(step, 0.05)
    torch.testing.assert_close(gains.gates_N.double(), expected_K, rtol=1e-3, atol=1e-3)
    assert torch.equal(final_gates({"logit.a": gains.logit_N})["a"], gated.gates_R)


@pytest.mark.parametrize("rank", [None, 5])
def test_gains_are_1_for_orthonormal_outputs_of_any_gram(rank):
    """Without a curvature the outputs along a direction come from it alone, whatever the Gram."""
    directions = singular_directions(gaussian(OUTPUTS, INPUTS, seed=2))
    eye_OO = torch.eye(OUTPUTS, dtype=torch.float64)
    found_K = closed_gains(*cut(*directions), moment(INPUTS, 4, rank), eye_OO)
    torch.testing.assert_close(found_K, torch.ones_like(found_K), rtol=0, atol=1e-8)


def test_gains_of_two_sided_factors_are_1():
    """Their directions are orthogonal on both sides: for the damped curvature with any Gram, and
    for the Gram with any curvature."""
    weight_OI, gram_II = gaussian(OUTPUTS, INPUTS, seed=0), moment(INPUTS, 1)
    curvature_OO, damping = moment(OUTPUTS, 3), 0.1
    statistic = InputGram(gram_II, 100, curvature=Curvature(curvature_OO, 100))
    made = decompose_two_sided(weight_OI, statistic, OUTPUTS, damping=damping)
    eye_OO = torch.eye(OUTPUTS, dtype=torch.float64)
    damped_OO = curvature_OO + damping * curvature_OO.diagonal().mean() * eye_OO
    given, other_II = cut(made.weight_OR, made.down_RI), moment(INPUTS, 5)
    for about in ((gram_II, damped_OO), (other_II, damped_OO), (gram_II, curvature_OO)):
        found_K = closed_gains(*given, *about)
        torch.testing.assert_close(found_K, torch.ones_like(found_K), rtol=0, atol=1e-8)


def test_gains_of_refitted_left_factors_are_1():
    """The left factor that is best for the rows that stay leaves nothing to a factor of each, for
    any curvature: the error is orthogonal to all outputs of these rows."""
    weight_OI, gram_II = gaussian(OUTPUTS, INPUTS, seed=6), moment(INPUTS, 7)
    right_KI = gaussian(3, INPUTS, seed=8)
    mapped_KI = right_KI @ gram_II
    left_OK = torch.linalg.solve(mapped_KI @ right_KI.T, mapped_KI @ weight_OI.T).T
    given = left_OK, right_KI, weight_OI - left_OK @ right_KI
    found_K = closed_gains(*given, gram_II, moment(OUTPUTS, 9))
    torch.testing.assert_close(found_K, torch.ones_like(found_K), rtol=0, atol=1e-8)
