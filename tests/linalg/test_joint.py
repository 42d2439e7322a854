"""Linears that share a basis, joined to one: what their best basis loses."""

import pytest
import torch
from torch.testing import assert_close

from orchestrator.linalg.joint import on_top, side_by_side
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, decompose
from orchestrator.linalg.two_sided import decompose_two_sided

RANK = 5


def members(shape, count=3, *, turned=False, seed=0):
    """Weights, moments H_e and curvatures C_e of linears with inputs and use of their own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tokens in range(40, 40 + 10 * count, 10):
        weight_OI, rows_TI, grads_TO = (
            torch.randn(*size, generator=generator, dtype=torch.float64)
            for size in (shape, (tokens, shape[1]), (tokens, shape[0]))
        )
        curvature_OO = grads_TO.T @ grads_TO
        stored = weight_OI.T @ curvature_OO @ weight_OI if turned else curvature_OO
        gram = InputGram(rows_TI.T @ rows_TI, tokens, None, Curvature(stored, tokens))
        found.append((weight_OI, gram, curvature_OO))
    weights, grams, curvatures = zip(*found, strict=True)
    return list(weights), list(grams), list(curvatures)


def plain(grams):
    return [InputGram(each.matrix_II, each.tokens) for each in grams]


def test_the_best_output_basis_is_that_of_all_outputs():
    """No basis of the rank loses less over all linears, each on inputs of its own: cut energies are
    the squares of the singular values of all `W_e H_e^(1/2)` side by side (Eckart-Young)."""
    weights, grams, _ = members((12, 7))
    weight, statistic = side_by_side(weights, plain(grams))
    result = decompose(weight, statistic, RANK, precision="exact")
    halves = [torch.linalg.cholesky(gram.matrix_II) for gram in grams]
    scaled = torch.cat([w @ half for w, half in zip(weights, halves, strict=True)], dim=1)
    best = torch.linalg.svdvals(scaled)[RANK:].square().sum()
    lost = 0.0
    for place, (weight_OI, gram) in enumerate(zip(weights, grams, strict=True)):
        down_RI = result.down_RI[:, 7 * place : 7 * (place + 1)]
        gap_OI = weight_OI - result.weight_OR @ down_RI
        lost += float(torch.trace(gap_OI @ gram.matrix_II @ gap_OI.T))
    assert lost == pytest.approx(float(best), rel=1e-9)
    assert statistic.tokens == 40 + 50 + 60


def test_an_output_basis_follows_the_loss():
    """With curvatures, energies cut are `Σ trace(C D_e H_e D_eᵀ)` for the C of all, damped."""
    weights, grams, curvatures = members((12, 7))
    weight, statistic = side_by_side(weights, grams)
    result = decompose_two_sided(weight, statistic, RANK, damping=0.01)
    whole_OO = sum(curvatures) / 150
    damped_OO = whole_OO + 0.01 * whole_OO.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    lost = 0.0
    for place, (weight_OI, gram) in enumerate(zip(weights, grams, strict=True)):
        gap_OI = weight_OI - result.weight_OR @ result.down_RI[:, 7 * place : 7 * (place + 1)]
        lost += float(torch.trace(damped_OO @ gap_OI @ gram.matrix_II @ gap_OI.T))
    predicted = result.total - float(result.energies_K[:RANK].sum())
    assert lost == pytest.approx(predicted, rel=1e-8)


@pytest.mark.parametrize(
    ("shape", "count", "turned"), [((6, 12), 3, False), ((12, 6), 3, True), ((3, 12), 2, False)]
)
def test_an_input_basis_follows_the_loss_of_every_linear(shape, count, turned):
    """Energies cut are `Σ trace(C_e D_e H D_eᵀ)`: H of all inputs, C_e of a linear, over all
    gradients; whether its curvature is stored by outputs or by inputs."""
    weights, grams, curvatures = members(shape, count, turned=turned)
    weight, statistic = on_top(weights, grams, [*map(str, range(count))])
    rank = min(RANK, *weight.shape)
    result = decompose_two_sided(weight, statistic, rank, damping=1e-6)
    moment_II = sum(gram.matrix_II for gram in grams)
    gradients, outputs = sum(gram.tokens for gram in grams), shape[0]
    lost = 0.0
    for place, (weight_OI, curvature_OO) in enumerate(zip(weights, curvatures, strict=True)):
        rows_OR = result.weight_OR[outputs * place : outputs * (place + 1)]
        gap_OI = weight_OI - rows_OR @ result.down_RI
        lost += float(torch.trace(curvature_OO / gradients @ gap_OI @ moment_II @ gap_OI.T))
    predicted = result.total - float(result.energies_K[:rank].sum())
    assert lost == pytest.approx(predicted, rel=1e-4)


def test_inputs_of_one_site_count_once():
    """Gate and up of an expert have one input, which a basis for both sees once."""
    weights, grams, _ = members((6, 12), 2)
    _, once = on_top(weights, plain([grams[0], grams[0]]), ["0", "0"])
    assert_close(once.matrix_II, grams[0].matrix_II)
    assert once.tokens == grams[0].tokens
    _, both = on_top(weights, plain(grams), ["0", "1"])
    assert_close(both.matrix_II, grams[0].matrix_II + grams[1].matrix_II)


def test_grams_of_outputs_are_refused():
    """They cannot be added for inputs, nor moved to other factors."""
    weights, grams, _ = members((6, 12), 2)
    outputs = [OutputGram(torch.eye(6, dtype=torch.float64), 3)] * 2
    with pytest.raises(ValueError, match="need Grams of inputs"):
        side_by_side(weights, outputs)
    with pytest.raises(ValueError, match="need Grams of inputs"):
        on_top(weights, outputs, ["0", "1"])
    with pytest.raises(ValueError, match="curvature of the outputs"):
        side_by_side(
            [each.T for each in weights],
            [
                InputGram(torch.eye(6, dtype=torch.float64), 3, None, each.curvature)
                for each in grams
            ],
        )
