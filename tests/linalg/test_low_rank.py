"""Truncation in the norm of the inputs: closed form, laws, and difficult cases."""

import pytest
import torch
from matrices import Specimen, gaussian, menagerie, of_model, orthonormal, with_spectrum

from orchestrator.errors import InputError
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import InputGram, OutputGram, decompose

EPS = torch.finfo(torch.float64).eps
MENAGERIE = menagerie()

every_specimen = pytest.mark.parametrize("name", MENAGERIE)
every_side = pytest.mark.parametrize("side", ["input", "output"])
every_precision = pytest.mark.parametrize("precision", ["exact", "fast"])


def ranks(specimen: Specimen) -> list[int]:
    size = min(specimen.weight_OI.shape)
    return sorted({1, max(1, size // 3), max(1, size - 1), size})


@pytest.mark.parametrize("shape", [(9, 9), (14, 6), (6, 14)])
@every_side
@every_precision
def test_closed_form(shape, side, precision):
    """Energies are the squared singular values of the outputs, U their left vectors."""
    sigma_K = torch.linspace(9, 1, min(shape), dtype=torch.float64)
    specimen = with_spectrum(*shape, sigma_K)
    result = decompose(
        specimen.weight_OI, specimen.statistic(side), len(sigma_K), precision=precision
    )
    left_OK = orthonormal(shape[0], len(sigma_K), seed=2)
    torch.testing.assert_close(result.energies_K, sigma_K**2, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.total, float((sigma_K**2).sum()), rtol=1e-12, atol=0)
    cosines = (left_OK * result.weight_OR).sum(dim=0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-10, atol=0)


@every_specimen
@every_side
@every_precision
def test_cut_energies_are_the_loss(name, side, precision):
    """Total less the first r energies is the loss of rank r, for every r, to 1e-6 of it."""
    specimen = MENAGERIE[name]
    size = min(specimen.weight_OI.shape)
    result = decompose(specimen.weight_OI, specimen.statistic(side), size, precision=precision)
    floor = 4 * size * EPS * result.total
    for rank in ranks(specimen):
        tail = result.total - float(result.energies_K[:rank].sum())
        approximation_OI = result.weight_OR[:, :rank] @ result.down_RI[:rank]
        assert specimen.loss(approximation_OI) == pytest.approx(tail, rel=1e-6, abs=floor)


@every_specimen
@every_side
@every_precision
def test_no_approximation_is_better(name, side, precision):
    """The loss of rank r is the sum of the squared singular values of the outputs beyond r."""
    specimen = MENAGERIE[name]
    energies_K = specimen.energies_K
    result = decompose(
        specimen.weight_OI, specimen.statistic(side), len(energies_K), precision=precision
    )
    floor = 4 * len(energies_K) * EPS * result.total
    torch.testing.assert_close(result.energies_K, energies_K, rtol=1e-9, atol=floor)
    for rank in ranks(specimen):
        approximation_OI = result.weight_OR[:, :rank] @ result.down_RI[:rank]
        best = float(energies_K[rank:].sum())
        assert specimen.loss(approximation_OI) == pytest.approx(best, rel=1e-6, abs=floor)


@every_specimen
@every_side
@every_precision
def test_factors_are_projections(name, side, precision):
    """U is orthonormal, `down` is U^T W, energies descend, and the report measures it."""
    specimen = MENAGERIE[name]
    size = min(specimen.weight_OI.shape)
    result = decompose(specimen.weight_OI, specimen.statistic(side), size, precision=precision)
    square_RR = result.weight_OR.T @ result.weight_OR
    tolerance = 100 * size * EPS
    torch.testing.assert_close(square_RR, torch.eye(size).double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        result.down_RI,
        result.weight_OR.T @ specimen.weight_OI,
        rtol=0,
        atol=tolerance * float(specimen.weight_OI.norm()),
    )
    assert (result.energies_K.diff() <= 0).all()
    assert result.energies_K[-1] >= 0
    assert result.report["orthonormality"] <= tolerance
    assert result.report["deviation"] <= tolerance
    assert result.report["precision"] == precision


@every_precision
def test_smaller_rank_is_a_slice(precision):
    """A smaller rank gives the leading part of a larger result."""
    specimen = of_model(40, 24)
    large = decompose(specimen.weight_OI, InputGram(specimen.gram_II), 20, precision=precision)
    small = decompose(specimen.weight_OI, InputGram(specimen.gram_II), 7, precision=precision)
    torch.testing.assert_close(small.weight_OR, large.weight_OR[:, :7], rtol=0, atol=1e-13)
    torch.testing.assert_close(small.down_RI, large.down_RI[:7], rtol=0, atol=1e-12)
    assert torch.equal(small.energies_K, large.energies_K)


@pytest.mark.parametrize("name", ["few_tokens_tall", "few_tokens_wide", "zero_inputs"])
@every_side
@every_precision
def test_weight_determines_directions_without_input(name, side, precision):
    """Beyond the rank of the inputs, U explains as much of the weight itself as possible."""
    specimen = MENAGERIE[name]
    size = min(specimen.weight_OI.shape)
    result = decompose(specimen.weight_OI, specimen.statistic(side), size, precision=precision)
    known = int(torch.linalg.matrix_rank(specimen.inputs_TI))
    assert result.report["known_rank"] == known
    left_OK = result.weight_OR[:, :known]
    unexplained_OI = specimen.weight_OI - left_OK @ (left_OK.T @ specimen.weight_OI)
    tails_K = torch.linalg.svdvals(unexplained_OI) ** 2
    for rank in range(known + 1, size + 1):
        rest_OI = specimen.weight_OI - result.weight_OR[:, :rank] @ result.down_RI[:rank]
        best = float(tails_K[rank - known :].sum())
        assert float(rest_OI.norm() ** 2) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tokens", [None, 20])
def test_rounding_of_a_gram_is_not_taken_for_inputs(tokens):
    """A float32 Gram of 20 tokens has 20 known directions, with and without the number of
    tokens."""
    inputs_TI, weight_OI = gaussian(20, 64).float(), gaussian(48, 64, seed=1).float()
    gram = Gram(64).update(inputs_TI)
    result = decompose(weight_OI, InputGram(gram.matrix(), tokens), 48)
    assert result.report["known_rank"] == 20


@every_side
def test_both_statistics_agree(side):
    """The input Gram and the output Gram give the same approximation."""
    specimen = MENAGERIE["model"]
    result = decompose(specimen.weight_OI, specimen.statistic(side), 9, precision="exact")
    left_OK, _, _ = torch.linalg.svd(specimen.weight_OI @ specimen.inputs_TI.T)
    projection_OO = left_OK[:, :9] @ left_OK[:, :9].T
    torch.testing.assert_close(
        result.weight_OR @ result.down_RI, projection_OO @ specimen.weight_OI, rtol=0, atol=1e-9
    )


def test_scaling_the_weight_scales_the_factors():
    """Twice the weight has the same U to the bit, twice `down` and four times the energies."""
    specimen = of_model(40, 24)
    once = decompose(specimen.weight_OI, InputGram(specimen.gram_II), 12)
    twice = decompose(2 * specimen.weight_OI, InputGram(specimen.gram_II), 12)
    assert torch.equal(twice.weight_OR, once.weight_OR)
    assert torch.equal(twice.down_RI, 2 * once.down_RI)
    assert torch.equal(twice.energies_K, 4 * once.energies_K)


@every_side
@every_precision
def test_same_input_same_bits(side, precision):
    """Two calls agree to the bit, whatever the weight's strides."""
    specimen = of_model(40, 24)
    strided_OI = specimen.weight_OI.T.contiguous().T
    results = [
        decompose(weight_OI, specimen.statistic(side), 16, precision=precision)
        for weight_OI in (specimen.weight_OI, strided_OI)
    ]
    for field in ("weight_OR", "down_RI", "energies_K"):
        assert torch.equal(*(getattr(result, field) for result in results))
    assert results[0].report == results[1].report


def published(weight_OI: torch.Tensor, gram_II: torch.Tensor, rank: int) -> torch.Tensor:
    """Compute the approximation as the authors of SVD-LLM do: float64 Cholesky, float32 SVD."""
    lower_II = torch.linalg.cholesky(gram_II)
    inverse_II = torch.linalg.inv(lower_II).float()
    left_OK, sigma_K, right_KI = torch.linalg.svd(weight_OI @ lower_II.float())
    left_OR, right_RI = left_OK[:, :rank] * sigma_K[:rank], right_KI[:rank] @ inverse_II
    return left_OR.double() @ right_RI.double()


@pytest.mark.parametrize("shape", [(96, 96), (32, 96), (192, 64), (64, 192)])
@pytest.mark.parametrize("seed", [0, 10])
def test_fast_is_closer_to_the_optimum_than_the_published_way(shape, seed):
    """On a realistic spectrum in float32, `fast` has less excess loss than SVD-LLM's code."""
    specimen = of_model(*shape, seed=seed)
    weight_OI = specimen.weight_OI.float()
    specimen = Specimen(weight_OI.double(), specimen.inputs_TI)
    rank = weight_OI.numel() // sum(weight_OI.shape)
    result = decompose(weight_OI, InputGram(specimen.gram_II), rank)
    assert result.report["precision"] == "fast"
    assert result.report["deviation"] < 1e-8
    for cut in (rank // 4, rank // 2, rank):
        best = float(specimen.energies_K[cut:].sum())
        ours = specimen.loss(result.weight_OR[:, :cut].double() @ result.down_RI[:cut].double())
        theirs = specimen.loss(published(weight_OI, specimen.gram_II, cut))
        assert abs(ours - best) < theirs - best


@pytest.mark.parametrize(
    ("name", "precision", "basis"),
    [
        ("tall", "fast", "cholesky"),
        ("tall", "exact", "householder"),
        ("repeated_column", "fast", "householder"),
        ("low_rank_weight", "fast", "householder"),
        ("wide", "fast", "identity"),
    ],
)
def test_report_names_the_basis(name, precision, basis):
    """Nearly dependent columns use Householder reflections, and the report says so."""
    specimen = MENAGERIE[name]
    result = decompose(specimen.weight_OI, specimen.statistic("input"), 3, precision=precision)
    assert result.report["basis"] == basis


def test_fast_that_fails_its_check_becomes_exact():
    """Columns with hidden dependence fail the check, and are computed as `exact`."""
    upper_II = 2 * torch.eye(24).double() - torch.ones(24, 24).double().triu()
    specimen = Specimen(orthonormal(40, 24) @ upper_II, gaussian(60, 24))
    result = decompose(specimen.weight_OI, InputGram(specimen.gram_II), 24)
    assert result.report["precision"] == "exact"
    assert result.report["orthonormality"] < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_factors_have_the_dtype_of_the_weight(dtype):
    """Factors have the weight's dtype, at least float32; energies are float64."""
    specimen = MENAGERIE["tall"]
    result = decompose(specimen.weight_OI.to(dtype), InputGram(specimen.gram_II), 4)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.weight_OR.dtype == result.down_RI.dtype == expected
    assert result.energies_K.dtype == torch.float64
    assert result.weight_OR.is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_entries_are_counted(value):
    """A non-finite weight or Gram is refused; the message has the number of bad entries."""
    weight_OI, gram_II = gaussian(4, 4), torch.eye(4, dtype=torch.float64)
    weight_OI[1, :3] = value
    with pytest.raises(InputError, match="weight has 3 non-finite of 16 entries"):
        decompose(weight_OI, InputGram(gram_II), 2)
    gram_II[0, 1] = value
    with pytest.raises(InputError, match="input Gram has 1 non-finite of 16 entries"):
        decompose(gaussian(4, 4), InputGram(gram_II), 2)


def test_an_indefinite_statistic_is_refused():
    """A statistic with negative sums of squares is refused, with their number."""
    with pytest.raises(InputError, match="output Gram is not a second moment: 1 of 3 diagonal"):
        decompose(torch.eye(3), OutputGram(torch.diag(torch.tensor([1.0, 0.1, -0.5]))), 2)


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_ranks_are_refused(rank):
    """A rank outside 1 to the smaller side is refused."""
    with pytest.raises(ValueError, match=f"rank is {rank}, not in 1 to 4"):
        decompose(gaussian(4, 6), InputGram(torch.eye(6)), rank)


def test_statistic_of_another_shape_is_refused():
    """A Gram of the wrong side is refused."""
    with pytest.raises(ValueError, match=r"output Gram is \(6, 6\), the weight needs \(4, 4\)"):
        decompose(gaussian(4, 6), OutputGram(torch.eye(6)), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(96, 96), (192, 64), (64, 192)])
def test_gpu_agrees_with_cpu(shape):
    """On a GPU the factors stay on the device and have the same loss."""
    specimen = of_model(*shape)
    weight_OI, gram_II = specimen.weight_OI.float(), specimen.gram_II
    result = decompose(weight_OI.cuda(), InputGram(gram_II.cuda()), 24)
    expected = decompose(weight_OI, InputGram(gram_II), 24)
    assert result.weight_OR.is_cuda
    floor = 1e-12 * expected.total
    torch.testing.assert_close(result.energies_K.cpu(), expected.energies_K, rtol=1e-9, atol=floor)
    assert result.report["deviation"] < 1e-9
