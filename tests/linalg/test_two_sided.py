"""Two-sided factors: the optimum in both norms, for statistics of either side."""

import pytest
import torch
from matrices import gaussian, menagerie, of_model

from orchestrator.errors import InputError
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, decompose
from orchestrator.linalg.two_sided import decompose_two_sided
from orchestrator.methods import make_method

SPECIMENS = menagerie()
every_specimen = pytest.mark.parametrize("name", SPECIMENS)


def gradients(specimen, seed=7):
    """Make rows of output gradients, and their statistic."""
    outputs, inputs = specimen.weight_OI.shape
    rows_TO = gaussian(2 * outputs + 5, outputs, seed=seed) @ gaussian(outputs, outputs, seed=8)
    small_TK = rows_TO if outputs <= inputs else rows_TO @ specimen.weight_OI
    return rows_TO, Curvature(small_TK.T @ small_TK, len(rows_TO))


def statistic(specimen, side, curvature):
    gram_II, tokens = specimen.gram_II, len(specimen.inputs_TI)
    if side == "input":
        return InputGram(gram_II, tokens, curvature=curvature)
    gram_OO = specimen.weight_OI @ gram_II @ specimen.weight_OI.T
    return OutputGram(gram_OO, tokens, curvature=curvature)


def damped(rows_TO, weight_OI, damping):
    """Compute C, damped in the weight's column space, which is the whole space if O <= I."""
    c_OO = rows_TO.T @ rows_TO / len(rows_TO)
    if weight_OI.shape[0] <= weight_OI.shape[1]:
        return c_OO + damping * c_OO.diagonal().mean() * torch.eye(len(c_OO), dtype=c_OO.dtype)
    basis_OK = torch.linalg.qr(weight_OI)[0]
    inner_KK = basis_OK.T @ c_OO @ basis_OK
    return c_OO + damping * inner_KK.diagonal().mean() * (basis_OK @ basis_OK.T)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("name", ["tall", "wide", "square", "model", "equal_energies", "one_row"])
def test_no_factors_of_a_rank_lose_less(name, damping, side):
    """trace(C D H D^T) is the tail of the singular values of C^(1/2) W H^(1/2), at every rank."""
    specimen = SPECIMENS[name]
    weight_OI = specimen.weight_OI
    rows_TO, curvature = gradients(specimen)
    size = min(weight_OI.shape)
    found = decompose_two_sided(
        weight_OI, statistic(specimen, side, curvature), size, damping=damping
    )
    c_OO = damped(rows_TO, weight_OI, damping)
    root_OO = torch.linalg.cholesky(c_OO + 1e-14 * c_OO.trace() * torch.eye(len(c_OO)))
    sigma_K = torch.linalg.svdvals(root_OO.T @ weight_OI @ specimen.inputs_TI.T).square()[:size]
    torch.testing.assert_close(found.energies_K, sigma_K, rtol=1e-6, atol=1e-7 * float(sigma_K[0]))
    for rank in (0, 1, size // 2, size):
        gap_OI = weight_OI - found.weight_OR[:, :rank] @ found.down_RI[:rank]
        lost = torch.sum(c_OO * (gap_OI @ specimen.gram_II @ gap_OI.T))
        expected = float(sigma_K[rank:].sum())
        assert float(lost) == pytest.approx(expected, rel=1e-6, abs=1e-8 * found.total)


@pytest.mark.parametrize("side", ["input", "output"])
@every_specimen
def test_errors_of_outputs_and_weight_are_those_measured(name, side):
    """The totals less the explained parts are the errors of the factors, on every specimen."""
    specimen = SPECIMENS[name]
    weight_OI = specimen.weight_OI
    size = min(weight_OI.shape)
    _, curvature = gradients(specimen)
    found = decompose_two_sided(weight_OI, statistic(specimen, side, curvature), size, damping=0.01)
    weight_total = float(weight_OI.square().sum())
    assert found.activation_total == pytest.approx(specimen.loss(torch.zeros_like(weight_OI)))
    for rank in (1, size // 2, size):
        approximation_OI = found.weight_OR[:, :rank] @ found.down_RI[:rank]
        left = found.activation_total - float(found.activation_R[:rank].sum())
        assert left == pytest.approx(
            specimen.loss(approximation_OI), rel=1e-5, abs=1e-7 * found.activation_total
        )
        left = weight_total - float(found.weight_R[:rank].sum())
        lost = float((weight_OI - approximation_OI).square().sum())
        assert left == pytest.approx(lost, rel=1e-5, abs=1e-7 * weight_total)
    assert found.report["deviation"] < 1e-7


def test_a_flat_curvature_is_no_curvature():
    """With C = 1 the product of the factors is that of the input norm alone, at every rank."""
    specimen = of_model(24, 24)
    flat = Curvature(torch.eye(24, dtype=torch.float64) * 60, 60)
    two = decompose_two_sided(
        specimen.weight_OI, statistic(specimen, "input", flat), 20, damping=0.1
    )
    one = decompose(specimen.weight_OI, InputGram(specimen.gram_II), 20, precision="exact")
    for rank in (1, 7, 20):
        torch.testing.assert_close(
            two.weight_OR[:, :rank] @ two.down_RI[:rank],
            one.weight_OR[:, :rank] @ one.down_RI[:rank],
            rtol=1e-6,
            atol=1e-8,
        )


def test_gradients_of_zero_cost_nothing():
    """A linear without gradients has no energy, but has factors."""
    specimen = SPECIMENS["tall"]
    none = Curvature(torch.zeros(12, 12, dtype=torch.float64), 0)
    found = decompose_two_sided(
        specimen.weight_OI, statistic(specimen, "input", none), 12, damping=0.01
    )
    assert found.total == 0
    assert not found.energies_K.any()
    torch.testing.assert_close(found.weight_OR @ found.down_RI, specimen.weight_OI)


@every_specimen
def test_half_precision_and_float32_weights_give_float32_factors(name):
    """The factors have the weight's precision, at least float32, and are finite."""
    specimen = SPECIMENS[name]
    _, curvature = gradients(specimen)
    given = statistic(specimen, "input", curvature)
    for dtype in (torch.bfloat16, torch.float32):
        found = decompose_two_sided(specimen.weight_OI.to(dtype), given, 1, damping=0.01)
        assert found.weight_OR.dtype == found.down_RI.dtype == torch.float32
        assert bool(found.weight_OR.isfinite().all() and found.down_RI.isfinite().all())


def test_what_is_no_curvature_is_refused():
    """A missing curvature, one of another size, NaN, and a negative diagonal raise clear errors."""
    specimen = SPECIMENS["tall"]

    def attempt(curvature):
        given = statistic(specimen, "input", curvature)
        decompose_two_sided(specimen.weight_OI, given, 3, damping=0.01)

    with pytest.raises(ValueError, match="need a curvature"):
        attempt(None)
    with pytest.raises(ValueError, match=r"\(12, 12\)"):
        attempt(Curvature(torch.eye(30), 1))
    with pytest.raises(InputError, match="non-finite"):
        attempt(Curvature(torch.full((12, 12), torch.nan), 1))
    with pytest.raises(InputError, match="not a second moment"):
        attempt(Curvature(-torch.eye(12), 1))


def test_the_method_is_its_options():
    """The unit key includes the damping; labels are part of the key of the statistics instead."""
    assert make_method("two-sided", {"damping": 0.5}).decomposition == "two-sided damping=0.5"
    assert make_method("two-sided", {"draws": 3}).label_draws == 3
    assert make_method("svd-llm", {}).label_draws == 0
