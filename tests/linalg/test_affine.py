"""Affine factors: principal components of the outputs with a bias, and the sums that they need."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import Specimen, gaussian, of_model

from orchestrator.errors import InputError
from orchestrator.linalg.affine import affine_bias, decompose_affine
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.group_sums import GroupSums
from orchestrator.linalg.low_rank import InputGram, InputMeans, OutputGram, decompose


def with_mean(outputs, inputs, rows=60, seed=0, mean=2.0):
    """Inputs about a mean that is not zero."""
    centre_I = mean * gaussian(inputs, seed=seed + 9)
    inputs_TI = gaussian(rows, inputs, seed=seed) @ gaussian(inputs, inputs, seed=seed + 1)
    return Specimen(gaussian(outputs, inputs, seed=seed + 2), inputs_TI + centre_I)


def means_of(inputs_TI, *, sequence=None, group=1):
    """Means of rows in sequences of this length, and groups of so many of them."""
    sums = GroupSums(inputs_TI.shape[1], size=group)
    for number, rows_TI in enumerate(inputs_TI.split(sequence or len(inputs_TI))):
        sums.update(rows_TI, number)
    return InputMeans(*sums.sums())


def statistics(specimen, **groups):
    """Both Grams of a specimen, with the means."""
    weight_OI, gram_II, tokens = specimen.weight_OI, specimen.gram_II, len(specimen.inputs_TI)
    about = {"tokens": tokens, "means": means_of(specimen.inputs_TI, **groups)}
    output_OO = weight_OI @ gram_II @ weight_OI.T
    return InputGram(gram_II, **about), OutputGram(output_OO, **about)


def lost(specimen, found, rank):
    """Σ|W x − (W' x + b)|², by definition."""
    weight_OR, down_RI = found.weight_OR[:, :rank], found.down_RI[:rank]
    bias_O = affine_bias(found.output_mean_O, found.input_mean_I, weight_OR, down_RI)
    gap_TO = specimen.inputs_TI @ (specimen.weight_OI - weight_OR @ down_RI).T - bias_O
    return float(gap_TO.square().sum())


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_loss_is_the_eigenvalues_that_are_cut(shape):
    """For every rank and either Gram: total less the first r energies is Σ|Wx − W'x − b|²."""
    specimen = with_mean(*shape)
    outputs_TO = specimen.inputs_TI @ specimen.weight_OI.T
    spread_OO = torch.cov(outputs_TO.T, correction=0) * len(outputs_TO)
    for statistic in statistics(specimen):
        found = decompose_affine(specimen.weight_OI, statistic, min(shape), covariance="total")
        values_K = torch.linalg.eigvalsh(spread_OO).flip(0)[: min(shape)]
        torch.testing.assert_close(found.energies_K, values_K, rtol=1e-9, atol=1e-9)
        energy = float(outputs_TO.square().sum())
        assert found.activation_total + found.mean_energy == pytest.approx(energy)
        for rank in range(1, min(shape) + 1):
            expected = lost(specimen, found, rank)
            for energies, total in (
                (found.energies_K, found.total),
                (found.activation_R, found.activation_total),
            ):
                said = total - float(energies[:rank].sum())
                assert said == pytest.approx(expected, rel=1e-9, abs=1e-10 * energy)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_affine_map_of_the_rank_loses_less(rank):
    """Alternating least squares over A [6, r], B [r, 5] and b from ten starts ends at the optimum,
    and below it nowhere."""
    specimen = with_mean(6, 5)
    outputs_TO = specimen.inputs_TI @ specimen.weight_OI.T
    found = decompose_affine(specimen.weight_OI, statistics(specimen)[0], 5, covariance="total")
    optimum, best = lost(specimen, found, rank), float("inf")
    ones_T1 = torch.ones(len(outputs_TO), 1, dtype=torch.float64)
    for seed in range(10):
        right_RI = gaussian(rank, 5, seed=100 + seed)
        for _ in range(300):
            inner_TR = torch.cat([specimen.inputs_TI @ right_RI.T, ones_T1], dim=1)
            left = torch.linalg.lstsq(inner_TR, outputs_TO).solution
            left_RO, bias_O = left[:-1], left[-1]
            target_TR = (outputs_TO - bias_O) @ torch.linalg.pinv(left_RO)
            right_RI = torch.linalg.lstsq(specimen.inputs_TI, target_TR).solution.T
        gap_TO = outputs_TO - specimen.inputs_TI @ right_RI.T @ left_RO - bias_O
        best = min(best, float(gap_TO.square().sum()))
        assert best >= optimum * (1 - 1e-9)
    assert best == pytest.approx(optimum, rel=1e-4)


@given(seed=st.integers(0, 1000), mean=st.floats(0, 5))
def test_a_bias_is_worth_a_rank_at_most(seed, mean):
    """The linear optimum of the same rank loses no less, that of one rank more no more."""
    specimen = with_mean(6, 5, seed=seed, mean=mean)
    statistic, _ = statistics(specimen)
    affine = decompose_affine(specimen.weight_OI, statistic, 5, covariance="total")
    plain = decompose(specimen.weight_OI, InputGram(specimen.gram_II), 5)
    scale = plain.total
    for rank in range(1, 5):
        loss = affine.total - float(affine.energies_K[:rank].sum())
        linear, next_linear = (
            plain.total - float(plain.energies_K[:each].sum()) for each in (rank, rank + 1)
        )
        assert next_linear - 1e-10 * scale <= loss <= linear + 1e-10 * scale


def test_total_has_no_groups_and_pooled_is_their_mean():
    """Groups change nothing of `total`; `pooled` of one group is `total`, and of groups of one size
    the mean of their covariances, each about its own mean."""
    specimen = with_mean(6, 5, rows=96)
    specimen.inputs_TI[48:] += 3  # another topic
    (one, _), (many, output) = statistics(specimen), statistics(specimen, sequence=8, group=3)
    weight_OI = specimen.weight_OI

    def energies(statistic, covariance):
        return decompose_affine(weight_OI, statistic, 5, covariance=covariance).energies_K

    total_K = energies(one, "total")
    torch.testing.assert_close(energies(many, "total"), total_K, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(energies(one, "pooled"), total_K, rtol=1e-12, atol=1e-9)
    groups = (specimen.inputs_TI @ weight_OI.T).split(24)
    mean_OO = torch.stack([torch.cov(rows.T, correction=0) for rows in groups]).mean(dim=0)
    expected_K = 96 * torch.linalg.eigvalsh(mean_OO).flip(0)[:5]
    for statistic in (many, output):
        torch.testing.assert_close(energies(statistic, "pooled"), expected_K, rtol=1e-9, atol=1e-9)
    assert float(expected_K.sum()) < 0.9 * float(total_K.sum())


def test_the_order_of_sequences_has_no_part_in_the_total():
    """A permutation of sequences of unequal length changes factors and mean by rounding alone."""
    specimen = with_mean(6, 5)
    moved = Specimen(specimen.weight_OI, specimen.inputs_TI.flip(0))
    one, other = (
        decompose_affine(
            each.weight_OI, statistics(each, sequence=7, group=2)[0], 5, covariance="total"
        )
        for each in (specimen, moved)
    )
    torch.testing.assert_close(one.energies_K, other.energies_K, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.output_mean_O, other.output_mean_O, rtol=1e-12, atol=1e-12)


ROWS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(lengths=ROWS, size=st.integers(1, 3))
def test_group_sums_are_a_monoid(lengths, size):
    """Parts merged in any order are the whole; an empty one is neutral; sums are those of rows."""
    rows = [gaussian(n, 4, seed=number) for number, n in enumerate(lengths)]
    whole, parts = GroupSums(4, size=size), [GroupSums(4, size=size) for _ in rows]
    for number, (part, rows_TI) in enumerate(zip(parts, rows, strict=True)):
        whole.update(rows_TI, number)
        part.update(rows_TI, number)
    merged = GroupSums(4, size=size)
    for part in reversed(parts):
        merged.merge(part)
    for found, expected in zip(merged.sums(), whole.sums(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    groups = [torch.cat(rows[start : start + size]) for start in range(0, len(rows), size)]
    counts = [len(each) for each in groups if len(each)]
    assert whole.sums()[1].tolist() == counts
    expected_GI = [each.sum(dim=0) for each in groups if len(each)]
    for sum_I, expected_I in zip(whole.sums()[0], expected_GI, strict=True):
        torch.testing.assert_close(sum_I, expected_I, rtol=1e-13, atol=1e-13)


def test_constant_outputs_are_kept_by_the_bias_alone():
    """Without variance there is no energy, whatever float32 sums leave of it, and every rank is
    exact."""
    row_I = 3.7 * gaussian(5).float()
    rows_TI = row_I.expand(1000, 5)
    gram = Gram(5).update(rows_TI)
    weight_OI = gaussian(6, 5).float()
    statistic = InputGram(gram.matrix(), 1000, means=means_of(rows_TI, sequence=100))
    found = decompose_affine(weight_OI, statistic, 4, covariance="total")
    assert found.total <= 1e-5 * found.mean_energy
    for rank in (1, 4):
        found_loss = lost(Specimen(weight_OI.double(), rows_TI.double()), found, rank)
        assert found_loss <= 1e-12 * found.mean_energy


def test_the_bias_keeps_the_mean_of_rounded_factors():
    """With the dense bias, in bfloat16 too: the mean output of factors and bias is the dense
    one's."""
    specimen, dense_O = of_model(12, 8), gaussian(12, seed=5)
    means = means_of(specimen.inputs_TI + 1)
    statistic = InputGram(
        (specimen.inputs_TI + 1).T @ (specimen.inputs_TI + 1),
        means=InputMeans(means.sums_GI, means.tokens_G, dense_O),
    )
    found = decompose_affine(specimen.weight_OI, statistic, 3, covariance="total")
    factors = found.weight_OR.bfloat16(), found.down_RI.bfloat16()
    bias_O = affine_bias(found.output_mean_O, found.input_mean_I, *factors)
    mean_I = (specimen.inputs_TI + 1).mean(dim=0)
    kept_O = factors[0].double() @ (factors[1].double() @ mean_I) + bias_O
    torch.testing.assert_close(kept_O, specimen.weight_OI @ mean_I + dense_O)


def test_bad_means_are_refused():
    """No means, those of other rows, NaN, and rows of another width."""
    specimen = with_mean(6, 5)
    weight_OI, gram_II = specimen.weight_OI, specimen.gram_II
    means = means_of(specimen.inputs_TI)

    def perform(given):
        decompose_affine(weight_OI, InputGram(gram_II, means=given), 3, covariance="total")

    with pytest.raises(ValueError, match="means of the inputs"):
        perform(None)
    with pytest.raises(InputError, match="too large for their Gram, which is of other rows"):
        perform(InputMeans(100 * means.sums_GI, means.tokens_G))
    with pytest.raises(InputError, match="mean of the inputs has"):
        perform(InputMeans(means.sums_GI * torch.nan, means.tokens_G))
    with pytest.raises(ValueError, match="not \\[tokens, 5\\]"):
        GroupSums(5, size=2).update(torch.zeros(2, 4), 0)
    with pytest.raises(ValueError, match="cannot join"):
        GroupSums(5, size=2).merge(GroupSums(5, size=3))
    with pytest.raises(InputError, match="sum of the inputs of 1 tokens"):
        GroupSums(2, size=1).update(torch.tensor([[1.0, torch.inf]]), 0).sums()
