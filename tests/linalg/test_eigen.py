"""Symmetric eigendecompositions and fallback solvers.

Solver failures are injected, since none occurs here; the fallback solvers are real.
"""

import re
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path

import pytest
import torch
from matrices import gaussian, of_model
from pipeline import contents, run, write_llama, write_text
from pretend import pretended_device

from orchestrator import api
from orchestrator.errors import InputError
from orchestrator.forecast.work import eigen_side
from orchestrator.linalg.eigen import LARGEST, Eigensolver, attempts
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, decompose
from orchestrator.linalg.refit import refit
from orchestrator.linalg.sparsity.rpca import rpca
from orchestrator.methods import METHODS
from orchestrator.plan.linear import Linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.float64]
UNCONVERGED = torch.linalg.LinAlgError(
    "linalg.eigh: The algorithm failed to converge because the input matrix is ill-conditioned or "
    "has too many repeated eigenvalues (error code: 3)."
)
"""PyTorch's message."""
CUSOLVER = "cusolver error: CUSOLVER_STATUS"
PACKAGE = Path(__file__).parents[2] / "orchestrator"


def second_moment(n, dtype=torch.float64, seed=0):
    """Second moment of n channels whose scales differ by up to 1e4."""
    generator = torch.Generator().manual_seed(seed)
    rows_TN = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    rows_TN *= torch.logspace(0, -4, n, dtype=torch.float64)
    return (rows_TN.T @ rows_TN).to(dtype)


@pytest.fixture
def failing(monkeypatch):
    """Make the first calls of a `torch.linalg` routine fail as given; counts all calls."""

    def fail(name, *outcomes):
        real, left, calls = getattr(torch.linalg, name), list(outcomes), []

        def call(matrix_NN, **options):
            calls.append((matrix_NN.device.type, matrix_NN.dtype, len(matrix_NN)))
            outcome = left.pop(0) if left else None
            if isinstance(outcome, Exception):
                raise outcome
            found = real(matrix_NN, **options)
            return outcome(found) if outcome else found

        monkeypatch.setattr(torch.linalg, name, call)
        return calls

    return fail


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 130])
def test_on_a_cpu_the_bits_are_those_of_torch(n, dtype, upper):
    """On a CPU the bits are those of torch, from one triangle, and the report names no fallback."""
    matrix_NN, eigen, side = second_moment(n, dtype), Eigensolver(), "U" if upper else "L"
    other_NN = torch.full_like(matrix_NN, torch.nan)
    given_NN = (
        matrix_NN.triu() + other_NN.tril(-1) if upper else matrix_NN.tril() + other_NN.triu(1)
    )
    values_N, vectors_NN = eigen.decompose(given_NN, upper=upper)
    expected_N, expected_NN = torch.linalg.eigh(matrix_NN, UPLO=side)
    assert torch.equal(values_N, expected_N)
    assert torch.equal(vectors_NN, expected_NN)
    alone_N = eigen.values(given_NN, upper=upper)
    assert torch.equal(alone_N, torch.linalg.eigvalsh(matrix_NN, UPLO=side))
    assert eigen.report == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "matrix_NN",
    [
        torch.zeros(9, 9, dtype=torch.float64),
        torch.eye(9, dtype=torch.float64),
        torch.ones(9, 9, dtype=torch.float64),
        1e-320 * torch.eye(9, dtype=torch.float64),
        -second_moment(40),
        torch.diag(torch.logspace(0, -30, 40, dtype=torch.float64)),
        torch.block_diag(1e15 * second_moment(20), 1e-15 * second_moment(20)),
    ],
    ids=["zero", "one", "rank one", "subnormal", "negative", "graded", "two scales"],
)
def test_no_sound_result_is_refused(matrix_NN, dtype):
    """Valid results pass the check for any rank, sign, scale and multiplicity of eigenvalues."""
    eigen = Eigensolver()
    eigen.decompose(matrix_NN.to(dtype))
    eigen.values(matrix_NN.to(dtype))
    assert eigen.report == {}


def test_a_solver_that_does_not_converge_gives_way_to_float64(failing):
    """The fallback's vectors are those of float64, rounded, and its name is in the report."""
    calls = failing("eigh", UNCONVERGED)
    matrix_NN, eigen = second_moment(50, torch.float32), Eigensolver()
    values_N, vectors_NN = eigen.decompose(matrix_NN, upper=True)
    expected_N, expected_NN = torch.linalg.eigh(matrix_NN.double(), UPLO="U")
    assert torch.equal(values_N, expected_N.float())
    assert torch.equal(vectors_NN, expected_NN.float())
    assert eigen.report == {"eigen": "cpu float64"}
    assert calls[:2] == [("cpu", torch.float32, 50), ("cpu", torch.float64, 50)]


def swapped(found):
    """Exchange two vectors of a result."""
    values_N, vectors_NN = found
    order = torch.arange(len(values_N))
    order[[3, 30]] = order[[30, 3]]
    return values_N, vectors_NN[:, order]


def stretched(found):
    """Scale one vector of a result."""
    values_N, vectors_NN = found
    vectors_NN[:, 0] *= 1 + 1e-3
    return values_N, vectors_NN


def not_a_number(found):
    values_N, vectors_NN = found
    vectors_NN[2, 2] = torch.nan
    return values_N, vectors_NN


@pytest.mark.parametrize("damage", [swapped, stretched, not_a_number])
def test_a_damaged_result_is_found_and_made_again(failing, damage):
    """A wrong result that a solver reports as success fails the check and is replaced, also in
    float32."""
    failing("eigh", damage)
    matrix_NN, eigen = second_moment(50, torch.float32), Eigensolver()
    values_N, vectors_NN = eigen.decompose(matrix_NN)
    rebuilt_NN = (vectors_NN * values_N) @ vectors_NN.T
    torch.testing.assert_close(rebuilt_NN, matrix_NN, rtol=0, atol=1e-5 * float(values_N[-1]))
    assert eigen.report == {"eigen": "cpu float64"}


def test_eigenvalues_alone_are_checked_too(failing):
    """A wrong sum of squared eigenvalues, which must be that of the entries, fails the check."""
    failing("eigvalsh", lambda values_N: values_N * (1 + 1e-2))
    matrix_NN, eigen = second_moment(50, torch.float32), Eigensolver()
    values_N = eigen.values(matrix_NN, upper=True)
    assert torch.equal(values_N, torch.linalg.eigvalsh(matrix_NN.double(), UPLO="U").float())
    assert eigen.report == {"eigen": "cpu float64"}


def test_what_no_solver_can_decompose_is_an_input_error(failing):
    """The error quotes every solver; NaN and infinity are reported before any call."""
    failing("eigh", UNCONVERGED, UNCONVERGED)
    with pytest.raises(InputError, match=r"cpu float32: .*converge.*; cpu float64: .*converge"):
        Eigensolver().decompose(second_moment(5, torch.float32))
    for bad in (torch.nan, torch.inf):
        matrix_NN = second_moment(5)
        matrix_NN[0, 4] = bad
        with pytest.raises(InputError, match="1 non-finite"):
            Eigensolver().decompose(matrix_NN, upper=True)
        Eigensolver().decompose(matrix_NN)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError(f"{CUSOLVER}_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
        RuntimeError(f"{CUSOLVER}_ALLOC_FAILED, when calling `cusolverDnXsyevd(handle, params)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_and_devices_are_no_matter_of_solvers(failing, error):
    """These errors are raised unchanged, and no other solver is called."""
    calls = failing("eigh", error)
    with pytest.raises(type(error)):
        Eigensolver().decompose(second_moment(5, torch.float32))
    assert len(calls) == 1


def test_other_failures_of_cusolver_are(failing):
    """An internal error within the routine itself is a failure of its algorithm."""
    call = "cusolverDnXsyevd(handle, params)"
    failing("eigh", RuntimeError(f"{CUSOLVER}_INTERNAL_ERROR, when calling `{call}`"))
    eigen = Eigensolver()
    eigen.decompose(second_moment(5, torch.float32))
    assert eigen.report == {"eigen": "cpu float64"}


def test_solvers_are_asked_in_turn_and_only_for_sizes_that_they_take():
    """The order is device, device in float64, CPU; a device takes 25,000 rows, LAPACK 32,766."""
    single, double = DTYPES
    assert attempts(4096, CUDA, single) == [(CUDA, single), (CUDA, double), (CPU, double)]
    assert attempts(4096, CUDA, double) == [(CUDA, double), (CPU, double)]
    assert attempts(4096, CPU, single) == [(CPU, single), (CPU, double)]
    assert attempts(4096, CPU, double) == [(CPU, double)]
    assert attempts(LARGEST["cuda"], CUDA, double)[0] == (CUDA, double)
    assert attempts(LARGEST["cuda"] + 1, CUDA, single) == [(CPU, double)]
    most = LARGEST["cpu"]
    workspaces = [1 + 6 * n + 2 * n * n for n in (most, most + 1)]
    assert workspaces[0] < 2**31 <= workspaces[1]
    assert attempts(most, CPU, double) == [(CPU, double)]
    for device in (CPU, CUDA):
        with pytest.raises(InputError, match=r"\[32767, 32767\] matrix is too large .* targets"):
            attempts(most + 1, device, double)


def test_a_matrix_that_is_too_large_is_refused_before_it_is_touched():
    """No memory of its size is allocated: the matrix here is a view of a single number."""
    matrix_NN = torch.zeros(1, 1, dtype=torch.float64).expand(2**17, 2**17)
    for solve in (Eigensolver().decompose, Eigensolver().values):
        with pytest.raises(InputError, match="too large"):
            solve(matrix_NN)


def test_the_report_of_whoever_decomposes_names_the_stand_in(failing):
    """Reports of low rank, robust PCA and refits name the fallback if the first solver fails."""
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(24, 40, generator=generator)
    result = rpca(weight_OI)
    assert "eigen" not in result.report
    failing("eigh", UNCONVERGED)
    again = rpca(weight_OI)
    assert again.report["eigen"] == "cpu float64"
    torch.testing.assert_close(again.weight_OR @ again.down_RI, result.weight_OR @ result.down_RI)


def test_a_decomposition_in_float64_has_nothing_to_fall_back_on_here(failing):
    """The CPU's float64 is the last solver: its failure is an error that names the matrix."""
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    gram_II = second_moment(8)
    factors = decompose(weight_OI, InputGram(gram_II), 3)
    failing("eigh", UNCONVERGED, UNCONVERGED)
    with pytest.raises(InputError, match=r"no eigendecomposition of a \[8, 8\] matrix"):
        decompose(weight_OI, InputGram(gram_II), 3)
    with pytest.raises(InputError, match=r"no eigendecomposition of a \[3, 3\] matrix"):
        refit(weight_OI, factors.weight_OR, factors.down_RI, gram_II)


@pytest.mark.parametrize("tokens", [300, 5])
@pytest.mark.parametrize(("outputs", "inputs"), [(60, 24), (24, 60), (30, 30)])
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.expert_activations])
def test_no_method_decomposes_more_than_the_smaller_side(method, outputs, inputs, tokens, failing):
    """The largest of all eigendecompositions has the side that a forecast counts.

    A weight of [60, 24] also represents two linears that share a basis; with few tokens the Gram is
    singular and the weight is decomposed in its null space.
    """
    linear = Linear(
        name="0.a",
        block=0,
        role="a",
        site="0.a",
        out_features=outputs,
        in_features=inputs,
        has_bias=False,
    )
    sizes = [failing(name) for name in ("eigh", "eigvalsh")]
    given = of_model(outputs, inputs)
    rows_TI, gradients_TO = given.inputs_TI[:tokens], gaussian(50, outputs)
    made = METHODS[method]
    side = made.side(linear, [linear])
    gram_II, bend_OO = rows_TI.T @ rows_TI, gradients_TO.T @ gradients_TO
    curvature = made.output_curvature or outputs <= inputs
    bend = bend_OO if curvature else given.weight_OI.T @ bend_OO @ given.weight_OI
    curvature = Curvature(bend, 50) if made.label_draws else None
    magnitude_I = rows_TI.abs().mean(dim=0)
    gradient = given.gradient(made.gradient, tokens)
    about = (len(rows_TI), magnitude_I, curvature, gradient, given.means(tokens))
    statistic = (
        InputGram(gram_II, *about)
        if side == "input"
        else OutputGram(given.weight_OI @ gram_II @ given.weight_OI.T, *about)
    )
    made.decompose(given.weight_OI, statistic, min(outputs, inputs))
    most = max((n for calls in sizes for _, _, n in calls), default=0)
    assert most == (0 if method == "wanda" else eigen_side(linear))


def test_nobody_else_calls_the_solvers():
    """Only one file names torch's symmetric eigendecompositions, so all callers have fallbacks."""
    named = re.compile(r"\beig(h|vals|valsh)?\(")
    files = {path.name for path in PACKAGE.rglob("*.py") if named.search(path.read_text())}
    assert files == {"eigen.py"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """One block: each of its seven linears falls back."""
    return write_llama(tmp_path_factory.mktemp("llama1") / "dense", blocks=1, hidden=32)


@pytest.fixture
def no_device_solver(monkeypatch):
    """Make the solver of a GPU fail like cuSOLVER's syevd, and list the dtypes of its calls."""
    real, asked = torch.linalg.eigh, []

    def eigh(matrix_NN, **options):
        if matrix_NN.is_cuda:
            asked.append(matrix_NN.dtype)
            raise UNCONVERGED
        return real(matrix_NN, **options)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return asked


REFITTED = {"options": {"svd-llm": {"refit": "always"}}}
FEW_DENSITIES = {"two-sided-sparse": {"densities": "0 0.5"}}


@pytest.mark.parametrize(
    ("method", "fields", "where"),
    [
        ("svd-llm", REFITTED, [("eigen",), ("refit", "eigen")]),
        ("two-sided", {}, [("eigen",)]),
        ("two-sided-sparse", {"options": FEW_DENSITIES}, [("eigen",)]),
        ("cap", {"options": {"cap": {"stage2": False}}}, [("eigen",)]),
    ],
    ids=["svd-llm", "two-sided", "two-sided-sparse", "cap"],
)
def test_a_run_goes_on_where_a_gpu_finds_no_eigenvectors(
    method, fields, where, llama, tmp_path, no_device_solver
):
    """The CPU solver gives the bytes of a CPU run; the report and its page name the fallback.

    The bytes of `cap` differ: its robust PCA starts in float32 on a CPU, the fallback is float64.
    """
    text = write_text(tmp_path / "text.txt")
    given = {"method": method, "samples": 2} | fields
    run(llama, tmp_path / "cpu", text, **given)
    with pretended_device():
        result = run(llama, tmp_path / "gpu", text, **given)
    assert torch.float64 in no_device_solver
    on_gpu, on_cpu = contents(tmp_path / "gpu"), contents(tmp_path / "cpu")
    weights = {name for name in on_cpu if name.endswith(".safetensors")}
    same = {name for name in weights if on_gpu[name] == on_cpu[name]}
    assert same == (weights if method != "cap" else set())
    assert weights
    linears = result.report["linears"].values()
    cut = [entry["numerics"] for entry in linears if entry["form"] != "dense"]
    assert cut
    for names, numerics in product(where, cut):
        assert reduce(getitem, names, numerics) == "cpu float64"
    assert "cpu float64 (" in api.report(tmp_path / "gpu").read_text()
