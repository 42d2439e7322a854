"""Methods with a norm of their own: plain SVD and ASVD, and the magnitudes that ASVD needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, menagerie, of_model

from orchestrator.errors import InputError, UsageError
from orchestrator.linalg.low_rank import InputGram, OutputGram
from orchestrator.linalg.scaled import decompose_scaled
from orchestrator.linalg.sparsity.magnitude import Magnitude
from orchestrator.methods import METHODS, make_method

SPECIMENS = {name: each for name, each in menagerie().items() if name != "zero_inputs"}
every_specimen = pytest.mark.parametrize("name", SPECIMENS)


def statistics(specimen):
    """Both Grams of one specimen, with its magnitudes."""
    inputs_TI, weight_OI = specimen.inputs_TI, specimen.weight_OI
    gram_II = inputs_TI.T @ inputs_TI
    magnitude_I = inputs_TI.abs().mean(dim=0)
    tokens = len(inputs_TI)
    return [
        InputGram(gram_II, tokens, magnitude_I),
        OutputGram(weight_OI @ gram_II @ weight_OI.T, tokens, magnitude_I),
    ]


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@every_specimen
def test_svd_is_the_truncated_svd(name):
    """Energies are the squared singular values; every rank has the loss of the best
    approximation."""
    weight_OI = SPECIMENS[name].weight_OI
    size = min(weight_OI.shape)
    expected_K = torch.linalg.svdvals(weight_OI).square()
    for statistic in statistics(SPECIMENS[name]):
        found = METHODS["svd"].decompose(weight_OI, statistic, size)
        scale = float(expected_K.sum()) or 1.0
        torch.testing.assert_close(found.energies_K, expected_K, rtol=0, atol=1e-13 * scale)
        assert found.total == pytest.approx(float(expected_K.sum()))
        for rank in range(1, size + 1):
            change_OI = weight_OI - found.weight_OR[:, :rank] @ found.down_RI[:rank]
            tail = float(expected_K[rank:].sum())
            assert float(change_OI.square().sum()) == pytest.approx(tail, abs=1e-12 * scale)


@every_specimen
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_scaled_svd_divided_by_the_scale(name, alpha):
    """U_r Σ_r V_rᵀ diag(s)⁻¹, with the division performed, is the same matrix."""
    weight_OI = SPECIMENS[name].weight_OI
    method = make_method("asvd", {"alpha": alpha})
    for statistic in statistics(SPECIMENS[name]):
        scale_I = statistic.magnitude_I**alpha + 1e-6
        energies_K = torch.linalg.svdvals(weight_OI * scale_I).square()
        found = method.decompose(weight_OI, statistic, min(weight_OI.shape))
        total = float(energies_K.sum()) or 1.0
        torch.testing.assert_close(found.energies_K, energies_K, rtol=0, atol=1e-13 * total)
        for rank in range(1, min(weight_OI.shape) + 1):
            if energies_K[rank - 1] < 1e-6 * total:
                break  # directions at the level of rounding noise are arbitrary
            if rank < len(energies_K) and energies_K[rank] > 0.99 * energies_K[rank - 1]:
                continue  # two directions of one energy may be exchanged
            expected_OI = truncated(weight_OI * scale_I, rank) / scale_I
            cut_OI = found.weight_OR[:, :rank] @ found.down_RI[:rank]
            torch.testing.assert_close(cut_OI, expected_OI, rtol=1e-7, atol=1e-9)


@every_specimen
@pytest.mark.parametrize("method", ["svd", "asvd"])
def test_the_loss_on_activations_is_that_of_the_outputs(method, name):
    """The total minus the first r activation energies is Σ|Wx − W'x|², for either Gram."""
    weight_OI, inputs_TI = SPECIMENS[name].weight_OI, SPECIMENS[name].inputs_TI
    size = min(weight_OI.shape)
    energy = float((inputs_TI @ weight_OI.T).square().sum())
    for statistic in statistics(SPECIMENS[name]):
        found = METHODS[method].decompose(weight_OI, statistic, size)
        assert found.activation_total == pytest.approx(energy)
        for rank in (1, size // 2 or 1, size):
            change_OI = weight_OI - found.weight_OR[:, :rank] @ found.down_RI[:rank]
            lost = float((inputs_TI @ change_OI.T).square().sum())
            said = found.activation_total - float(found.activation_R[:rank].sum())
            assert said == pytest.approx(lost, rel=1e-9, abs=1e-11 * energy)


def test_an_exponent_of_zero_is_the_plain_svd():
    """With alpha 0 all inputs have the same scale."""
    specimen = of_model(40, 24)
    (statistic, _) = statistics(specimen)
    plain = METHODS["svd"].decompose(specimen.weight_OI, statistic, 10)
    scaled = make_method("asvd", {"alpha": 0}).decompose(specimen.weight_OI, statistic, 10)
    torch.testing.assert_close(
        scaled.weight_OR @ scaled.down_RI, plain.weight_OR @ plain.down_RI, rtol=1e-9, atol=1e-12
    )


def test_svd_llm_loses_least_on_the_outputs():
    """For one specimen and rank: the whitened norm loses least, then ASVD's, then the plain one."""
    specimen = of_model(60, 40)
    (statistic, _) = statistics(specimen)
    lost = []
    for method in ("svd-llm", "asvd", "svd"):
        found = METHODS[method].decompose(specimen.weight_OI, statistic, 12)
        change_OI = specimen.weight_OI - found.weight_OR @ found.down_RI
        lost.append(float((specimen.inputs_TI @ change_OI.T).square().sum()))
    assert lost == sorted(lost)


def test_half_precision_weights_give_float32_factors():
    """A bfloat16 weight is decomposed like its float32 copy, bit for bit."""
    specimen = of_model(40, 24)
    (statistic, _) = statistics(specimen)
    half = specimen.weight_OI.bfloat16()
    one, other = (METHODS["asvd"].decompose(w, statistic, 9) for w in (half, half.float()))
    assert one.weight_OR.dtype == torch.float32
    assert torch.equal(one.weight_OR, other.weight_OR)
    assert torch.equal(one.down_RI, other.down_RI)
    assert torch.equal(one.activation_R, other.activation_R)


def test_bad_scales_and_statistics_are_refused():
    """A scale of the wrong size or not above 0; NaN anywhere; missing magnitudes."""
    weight_OI, gram = gaussian(6, 4), InputGram(torch.eye(4).double())
    ones = torch.ones(4, dtype=torch.float64)
    for scale in (ones[:3], 0 * ones):
        with pytest.raises(ValueError, match="above 0"):
            decompose_scaled(weight_OI, gram, 2, scale)
    with pytest.raises(InputError, match="scale"):
        decompose_scaled(weight_OI, gram, 2, ones * torch.nan)
    with pytest.raises(InputError, match="statistic"):
        decompose_scaled(weight_OI, InputGram(gram.matrix_II * torch.inf), 2, ones)
    with pytest.raises(ValueError, match="magnitudes"):
        METHODS["asvd"].decompose(weight_OI, gram, 2)


def test_options_are_checked():
    """Values and names are checked, and options change the unit."""
    with pytest.raises(UsageError, match="alpha is 3"):
        make_method("asvd", {"alpha": 3})
    with pytest.raises(UsageError, match="unknown option 'alhpa'; near misses: alpha"):
        make_method("asvd", {"alhpa": 0.5})
    with pytest.raises(UsageError, match="svd: unknown option 'alpha'; it takes none"):
        make_method("svd", {"alpha": 0.5})
    assert make_method("asvd", {}) == METHODS["asvd"]
    names = {make_method("asvd", {"alpha": a}).decomposition for a in (0, 0.5, 1, 1.0)}
    assert len(names) == 3


ROWS = st.integers(0, 20).flatmap(lambda n: st.integers(0, 20).map(lambda m: (n, m)))


@given(sizes=ROWS)
@settings(deadline=None, max_examples=30)
def test_magnitudes_are_a_monoid(sizes):
    """Merged parts equal the whole, an empty one is neutral, and the mean is that of all."""
    one_TI, two_TI = (gaussian(n, 5, seed=seed) for seed, n in enumerate(sizes))
    whole = Magnitude(5).update(torch.cat([one_TI, two_TI]))
    merged = Magnitude(5).update(one_TI).merge(Magnitude(5).update(two_TI))
    assert merged.tokens == whole.tokens == sum(sizes)
    torch.testing.assert_close(merged.mean(), whole.mean(), rtol=1e-14, atol=0)
    expected = torch.cat([one_TI, two_TI]).abs().sum(dim=0) / max(sum(sizes), 1)
    torch.testing.assert_close(whole.mean(), expected, rtol=1e-14, atol=0)
    again = Magnitude(5).merge(whole).merge(Magnitude(5))
    assert torch.equal(again.mean(), whole.mean())


def test_magnitudes_of_half_precision_are_summed_in_double():
    """A thousand ones and a thousandth each: no loss, where bfloat16 would stop at 256."""
    rows = torch.full((1000, 2), 1.0, dtype=torch.bfloat16)
    rows[:, 1] = -0.0009765625
    assert Magnitude(2).update(rows).mean().tolist() == [1.0, 0.0009765625]


def test_bad_rows_are_refused():
    """Rows of another width, and results that are not finite."""
    with pytest.raises(ValueError, match="not \\[tokens, 3\\]"):
        Magnitude(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="cannot join"):
        Magnitude(3).merge(Magnitude(4))
    with pytest.raises(InputError, match="mean magnitude of 1 tokens"):
        Magnitude(3).update(torch.tensor([[1.0, torch.inf, 0.0]])).mean()
