"""Directions behind the stored ones: the rest of an SVD, and nothing left of the weight."""

import pytest
import torch

from orchestrator.linalg.extend import extend_directions
from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.methods import make_method


def stored(method, weight_OI, rank):
    """Factors of a method, with a random statistic of inputs and outputs."""
    draw = torch.Generator().manual_seed(5)
    outputs, inputs = weight_OI.shape
    rows = torch.randn(200, inputs, generator=draw, dtype=torch.float64)
    grads = torch.randn(200, outputs, generator=draw, dtype=torch.float64).cumsum(1)
    own = grads.T @ grads
    curved = own if outputs <= inputs else weight_OI.double().T @ own @ weight_OI.double()
    statistic = InputGram(rows.T @ rows, curvature=Curvature(curved, 200))
    found = make_method(method, {}).decompose(weight_OI, statistic, rank)
    return found.weight_OR, found.down_RI


@pytest.mark.parametrize("method", ["svd", "svd-llm", "two-sided"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (14, 14)])
def test_all_directions_are_the_weight(method, shape):
    """K directions of every basis, the stored ones unchanged, whose product is W to rounding."""
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left_OR, right_RI = stored(method, weight_OI, 5)
    left_OK, right_KI = extend_directions(weight_OI, left_OR, right_RI)
    assert right_KI.shape == (min(shape), shape[1])
    assert torch.equal(left_OK[:, :5], left_OR)
    assert torch.equal(right_KI[:5], right_RI)
    torch.testing.assert_close(left_OK @ right_KI, weight_OI, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_of_an_svd_they_are_its_rest(shape):
    """All K directions are those of the SVD: singular values, and vectors but for signs."""
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    left_OK, right_KI = extend_directions(weight_OI, *stored("svd", weight_OI, 5))
    expected_OK, values_K, expected_KI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    torch.testing.assert_close(right_KI.norm(dim=1).double(), values_K, rtol=1e-5, atol=1e-5)
    parts = torch.einsum("ok,ki->koi", left_OK, right_KI).double()
    expected = torch.einsum("ok,k,ki->koi", expected_OK, values_K, expected_KI)
    torch.testing.assert_close(parts, expected, rtol=0, atol=1e-4)
