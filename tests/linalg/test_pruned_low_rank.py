"""Factors of pruned weights: plain and weighted truncation, ranks, energies and bad scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import Specimen, gaussian, of_model

from orchestrator.errors import InputError
from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.linalg.sparsity import pruned_low_rank
from orchestrator.linalg.sparsity.pruned_low_rank import decompose_pruned
from orchestrator.linalg.two_sided import decompose_two_sided
from orchestrator.methods import METHODS


def pruned(specimen, score_OI, rank, *, density=0.5, rows=True, inputs=False):
    statistic = InputGram(specimen.gram_II, len(specimen.inputs_TI))
    return decompose_pruned(
        *(specimen.weight_OI, statistic, score_OI, rank),
        density=density,
        weighs_rows=rows,
        weighs_inputs=inputs,
    )


def masked(weight_OI, score_OI, density):
    """The weight with its best entries alone, by definition; of equal ones the first."""
    count = int(density * score_OI.numel())
    best = score_OI.flatten().sort(descending=True, stable=True).indices[:count]
    found = torch.zeros_like(weight_OI).flatten()
    found[best] = weight_OI.flatten()[best]
    return found.view_as(weight_OI)


def row_weights(score_OI, density):
    d_O = masked(score_OI, score_OI, density).sum(dim=1).sqrt()
    return d_O.clamp(min=1e-3 * float(d_O.mean()))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_no_pruning_and_no_weights_are_the_plain_svd(shape):
    """Density 1 without weights of rows: products and energies are those of `svd`."""
    specimen, score_OI = of_model(*shape), gaussian(*shape, seed=4).abs()
    found = pruned(specimen, score_OI, 5, density=1.0, rows=False)
    plain = METHODS["svd"].decompose(specimen.weight_OI, InputGram(specimen.gram_II), 5)
    torch.testing.assert_close(found.energies_K, plain.energies_K, rtol=1e-9, atol=1e-12)
    for rank in (1, 5):
        products = (each.weight_OR[:, :rank] @ each.down_RI[:rank] for each in (found, plain))
        torch.testing.assert_close(*products, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.activation_R, plain.activation_R, rtol=1e-6, atol=1e-9)
    assert found.report["density"] == 1.0


@pytest.mark.parametrize(("shape", "density"), [((7, 5), 0.4), ((6, 4), 0.01), ((4, 8), 1.0)])
def test_the_stored_bits_are_those_of_the_mask(shape, density):
    """Any dtype of the weight is masked to the bit; the bits take a byte for eight entries."""
    specimen, score_OI = of_model(*shape), gaussian(*shape, seed=4).abs()
    found = pruned(specimen, score_OI, 2, density=density)
    assert found.mask_B.shape == (-(-score_OI.numel() // 8),)
    expected_OI = masked(specimen.weight_OI, score_OI, density)
    if "only_row" in found.report:
        row = int(score_OI.sum(dim=1).argmax())
        expected_OI[row] = specimen.weight_OI[row]
    for dtype in (torch.float64, torch.bfloat16):
        weight_OI = pruned_low_rank.masked(specimen.weight_OI.to(dtype), found.mask_B)
        assert torch.equal(weight_OI, expected_OI.to(dtype))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_factors_lose_less_in_the_weighted_norm(rank):
    """Weighted alternating least squares over A [6, r] and B [r, 5] from ten starts reaches the
    energies that are cut, and nothing below them."""
    specimen, score_OI = Specimen(gaussian(6, 5), gaussian(30, 5, seed=1)), gaussian(6, 5).square()
    found = pruned(specimen, score_OI, 5, density=0.6)
    target_OI, d_O1 = masked(specimen.weight_OI, score_OI, 0.6), row_weights(score_OI, 0.6)[:, None]

    def loss(weight_OI):
        return float((d_O1 * (target_OI - weight_OI)).square().sum())

    optimum = found.total - float(found.energies_K[:rank].sum())
    said = loss(found.weight_OR[:, :rank] @ found.down_RI[:rank])
    assert said == pytest.approx(optimum, rel=1e-8)
    best = float("inf")
    for seed in range(10):
        right_RI = gaussian(rank, 5, seed=50 + seed)
        for _ in range(300):
            # each row of A alone; then B with all rows weighted
            left_OR = target_OI @ torch.linalg.pinv(right_RI)
            right_RI = torch.linalg.lstsq(d_O1 * left_OR, d_O1 * target_OI).solution
        best = min(best, loss(left_OR @ right_RI))
        assert best >= optimum * (1 - 1e-9)
    assert best == pytest.approx(optimum, rel=1e-4)


def test_with_inputs_it_is_the_two_sided_truncation_with_a_diagonal_curvature():
    """For C = diag(d²) and the second moment of the inputs, both factor the pruned weight alike."""
    specimen, score_OI = of_model(8, 12), gaussian(8, 12, seed=3).square()
    found = pruned(specimen, score_OI, 4, inputs=True)
    curvature = Curvature(row_weights(score_OI, 0.5).square().diag(), 1)
    given = InputGram(specimen.gram_II, len(specimen.inputs_TI), curvature=curvature)
    target_OI = masked(specimen.weight_OI, score_OI, 0.5)
    other = decompose_two_sided(target_OI, given, 4, damping=1e-12)
    torch.testing.assert_close(found.energies_K, other.energies_K, rtol=1e-6, atol=1e-9)
    products = (each.weight_OR @ each.down_RI for each in (found, other))
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-7)


@given(
    seed=st.integers(0, 99),
    density=st.floats(0.01, 1),
    shape=st.sampled_from([(9, 6), (6, 9)]),
    empty=st.integers(0, 4),
)
def test_a_pruned_weight_has_the_rank_of_its_rows_and_columns_at_most(seed, density, shape, empty):
    """The number of rows and of columns with entries bounds the rank; each rank of a random mask
    is that of torch; the errors of both norms are those of the products against W."""
    specimen = Specimen(gaussian(*shape, seed=seed), gaussian(20, shape[1], seed=seed + 1))
    score_OI = gaussian(*shape, seed=seed + 2).square()
    score_OI[:, :empty] = 0
    found = pruned(specimen, score_OI, 3, density=density)
    report = found.report
    kept_OI = masked(specimen.weight_OI, score_OI, density)
    if "only_row" in report:
        row = int(score_OI.sum(dim=1).argmax())
        assert report["only_row"] == row
        assert (report["rows"], report["pruned_rank"]) == (1, 1)
    else:
        assert report["pruned_rank"] == int(torch.linalg.matrix_rank(kept_OI.float()))
        assert report["density"] == int(density * score_OI.numel()) / score_OI.numel()
    assert report["pruned_rank"] <= min(report["rows"], report["columns"])
    assert report["weight_rank"] == min(shape)
    for rank in (1, 3):
        gap_OI = specimen.weight_OI - found.weight_OR[:, :rank] @ found.down_RI[:rank]
        lost = float((gap_OI @ specimen.inputs_TI.T).square().sum())
        said = found.activation_total - float(found.activation_R[:rank].sum())
        assert said == pytest.approx(lost, rel=1e-9)
        total = float(specimen.weight_OI.square().sum())
        assert total - float(found.weight_R[:rank].sum()) == pytest.approx(
            float(gap_OI.square().sum()), rel=1e-9
        )


def test_a_density_without_entries_keeps_the_best_row():
    """Fewer than one entry: the row with the largest sum of scores stays whole, and is named."""
    specimen, score_OI = of_model(8, 6), gaussian(8, 6).square()
    score_OI[5] += 100
    found = pruned(specimen, score_OI, 2, density=0.02)
    assert found.report["only_row"] == 5
    expected_OI = torch.zeros(8, 6, dtype=torch.float64)
    expected_OI[5] = specimen.weight_OI[5]
    product_OI = found.weight_OR[:, :1] @ found.down_RI[:1]
    torch.testing.assert_close(product_OI, expected_OI, rtol=1e-6, atol=1e-9)


def test_bad_scores_are_refused():
    """Scores that are all zero, not finite, or of another shape."""
    specimen = of_model(8, 6)
    with pytest.raises(InputError, match=r"all scores .* are zero"):
        pruned(specimen, torch.zeros(8, 6), 2)
    with pytest.raises(InputError, match="scores has 1 non-finite of 48"):
        pruned(specimen, torch.ones(48).index_fill(0, torch.tensor(3), torch.nan).view(8, 6), 2)
    with pytest.raises(ValueError, match=r"scores are \(6, 8\)"):
        pruned(specimen, torch.ones(6, 8), 2)
