"""Joint fit of entries: the least-squares optimum on their support, without any increase of
loss."""

import pytest
import torch
from matrices import gaussian, menagerie
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.linalg.sparsity.fit_entries import correlations, fit_entries, second_moment_of

OUTPUTS, INPUTS = 7, 5


def moment(size, seed, rank=None):
    rows_TN = gaussian(rank or 3 * size, size, seed=seed)
    return rows_TN.T @ rows_TN


def loss(gap_OI, curvature_OO, moment_II):
    return float(torch.trace(curvature_OO @ gap_OI @ moment_II @ gap_OI.T))


def put(positions_N, values_N, like_OI):
    found_OI = torch.zeros_like(like_OI)
    found_OI.view(-1)[positions_N] = values_N.to(like_OI.dtype)
    return found_OI


def some(total, count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values


@pytest.mark.parametrize("count", [1, 4, 20, 35])
def test_result_is_the_least_squares_solution(count):
    """With as many steps as entries, the result solves the normal equations."""
    rest_OI = gaussian(OUTPUTS, INPUTS, seed=0)
    curvature_OO, moment_II = moment(OUTPUTS, 1), moment(INPUTS, 2)
    positions_N = some(rest_OI.numel(), count)
    whole = torch.kron(curvature_OO, moment_II)
    right_N = (curvature_OO @ rest_OI @ moment_II).flatten()[positions_N]
    expected_N = torch.linalg.solve(whole[positions_N][:, positions_N], right_N)
    found_N = fit_entries(rest_OI, positions_N, curvature_OO, moment_II, steps=3 * count)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", menagerie())
def test_no_step_raises_the_loss(name):
    """No step increases the loss, on every specimen."""
    specimen = menagerie()[name]
    rest_OI, moment_II = specimen.weight_OI.double(), specimen.gram_II.double()
    curvature_OO = moment(len(rest_OI), 1)
    positions_N = some(rest_OI.numel(), max(rest_OI.numel() // 2, 1))
    least = before = loss(rest_OI, curvature_OO, moment_II)
    for steps in range(6):
        found_N = fit_entries(rest_OI, positions_N, curvature_OO, moment_II, steps=steps)
        after = loss(rest_OI - put(positions_N, found_N, rest_OI), curvature_OO, moment_II)
        assert after <= least * (1 + 1e-9)
        least = after
    gradient_OI = curvature_OO @ rest_OI @ moment_II
    if float(gradient_OI.flatten()[positions_N].abs().max()) > 1e-6 * max(before, 1e-300):
        assert least < before


def test_no_step_changes_nothing():
    """Zero steps, a zero curvature and zero inputs change no entry."""
    rest_OI, positions_N = gaussian(OUTPUTS, INPUTS, seed=0), some(35, 12)
    curvature, moves = moment(OUTPUTS, 1), moment(INPUTS, 2)
    zeros = torch.zeros_like
    for *given, steps in (
        (curvature, moves, 0),
        (zeros(curvature), moves, 5),
        (curvature, zeros(moves), 5),
    ):
        assert not fit_entries(rest_OI, positions_N, *given, steps=steps).any()
    moves[2] = moves[:, 2] = 0
    found_OI = put(
        positions_N, fit_entries(rest_OI, positions_N, curvature, moves, steps=9), rest_OI
    )
    assert not found_OI[:, 2].any()
    assert found_OI.any()


def test_an_indefinite_moment_stops_early():
    """An indefinite curvature gives finite numbers, and no larger loss than without a fit."""
    rest_OI, positions_N = gaussian(OUTPUTS, INPUTS, seed=0), some(35, 20)
    curvature_OO = torch.eye(OUTPUTS, dtype=torch.float64)
    curvature_OO[0, 1] = curvature_OO[1, 0] = 1.5
    moment_II = moment(INPUTS, 2)
    found_N = fit_entries(rest_OI, positions_N, curvature_OO, moment_II, steps=50)
    assert found_N.isfinite().all()
    after_OI = rest_OI - put(positions_N, found_N, rest_OI)
    assert loss(after_OI, curvature_OO, moment_II) <= loss(rest_OI, curvature_OO, moment_II)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    """Results have the weight's dtype, at least float32; statistics may be more precise."""
    rest_OI = gaussian(OUTPUTS, INPUTS, seed=0).to(dtype)
    found_N = fit_entries(rest_OI, some(35, 9), moment(OUTPUTS, 1), moment(INPUTS, 2), steps=4)
    assert found_N.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("entries", [1, 20, 1000])
def test_a_packed_moment_is_reproduced(size, rank, entries, monkeypatch):
    """The diagonal's root and the correlations reproduce the moment, to half precision, for bands
    of one row, of several, and of all rows."""
    monkeypatch.setattr("orchestrator.linalg.sparsity.fit_entries.BAND_ENTRIES", entries)
    matrix_NN = moment(size, 4, rank=rank)
    matrix_NN[size // 2] = matrix_NN[:, size // 2] = 0
    root_N = matrix_NN.diagonal().sqrt().float()
    found_P = correlations(matrix_NN)
    assert found_P.shape == (size * (size - 1) // 2,)
    found_NN = second_moment_of(root_N, found_P).double()
    assert torch.equal(found_NN, found_NN.T)
    scale_NN = root_N.double()[:, None] * root_N.double()
    assert float((found_NN - matrix_NN).abs().sub(2**-11 * scale_NN).max()) <= 1e-9


def test_each_pair_is_stored_once():
    """Pairs are stored in the defined order: following channels by row, then opposite ones."""
    for size in (5, 6):
        matrix_NN = moment(size, 4)
        root_N = matrix_NN.diagonal().sqrt()
        whole_NN = (matrix_NN / root_N / root_N[:, None]).half()
        pairs = [(i, (i + d) % size) for i in range(size) for d in range(1, (size + 1) // 2)]
        pairs += [(i, i + size // 2) for i in range(size // 2)] if size % 2 == 0 else []
        assert len({frozenset(pair) for pair in pairs}) == len(pairs) == size * (size - 1) // 2
        expected_P = torch.stack([whole_NN[pair] for pair in pairs])
        torch.testing.assert_close(correlations(matrix_NN), expected_P, rtol=2**-10, atol=0)


class Count(TorchDispatchMode):
    """Counter of operations."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_bands_not_rows_are_packed():
    """Twice the channels take the same number of operations while they fit one band."""
    counts = []
    for size in (40, 80):
        matrix_NN = moment(size, 4)
        with Count() as count:
            second_moment_of(matrix_NN.diagonal().sqrt().float(), correlations(matrix_NN))
        counts.append(count.operations)
    assert counts[0] == counts[1] < 80
