"""Refitted left factors."""

import pytest
import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.low_rank import InputGram, decompose
from orchestrator.linalg.refit import refit


def case(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make a weight, its factors for some inputs, and other inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(20, 12, dtype=torch.float64, generator=generator)
    old_TI = torch.randn(200, 12, dtype=torch.float64, generator=generator)
    new_TI = old_TI[:tokens] @ torch.randn(12, 12, dtype=torch.float64, generator=generator)
    factors = decompose(weight_OI, InputGram(old_TI.T @ old_TI), 5, precision="exact")
    return weight_OI, factors.weight_OR, factors.down_RI, new_TI


def test_it_is_the_least_squares_solution():
    """The result equals `lstsq` on the inputs themselves."""
    weight_OI, left_OR, down_RI, rows_TI = case(200)
    found_OR = refit(weight_OI, left_OR, down_RI, rows_TI.T @ rows_TI)
    expected_RO = torch.linalg.lstsq(rows_TI @ down_RI.T, rows_TI @ weight_OI.T).solution
    torch.testing.assert_close(found_OR, expected_RO.T, rtol=1e-8, atol=1e-8)


def test_on_the_inputs_of_the_decomposition_nothing_changes():
    """On the inputs of the decomposition the left factor is already optimal."""
    weight_OI, _, _, rows_TI = case(200)
    gram_II = rows_TI.T @ rows_TI
    factors = decompose(weight_OI, InputGram(gram_II), 5, precision="exact")
    found_OR = refit(weight_OI, factors.weight_OR, factors.down_RI, gram_II)
    torch.testing.assert_close(found_OR, factors.weight_OR, rtol=0, atol=1e-9)


def test_directions_that_no_input_excites_stay():
    """With 3 tokens and rank 5 the outputs are met exactly, and A changes in 3 directions only."""
    weight_OI, left_OR, down_RI, rows_TI = case(3)
    found_OR = refit(weight_OI, left_OR, down_RI, rows_TI.T @ rows_TI)
    outputs_TO = rows_TI @ down_RI.T @ found_OR.T
    torch.testing.assert_close(outputs_TO, rows_TI @ weight_OI.T, rtol=1e-6, atol=1e-6)
    assert int(torch.linalg.matrix_rank(found_OR - left_OR, rtol=1e-6)) == 3


def test_nothing_excited_means_nothing_changed():
    """With H = 0 the factor is unchanged, to the bit."""
    weight_OI, left_OR, down_RI, _ = case(3)
    assert torch.equal(refit(weight_OI, left_OR, down_RI, torch.zeros(12, 12)), left_OR)


def test_a_damaged_gram_is_refused():
    """NaN in H raises an error."""
    weight_OI, left_OR, down_RI, _ = case(3)
    with pytest.raises(InputError, match="input Gram"):
        refit(weight_OI, left_OR, down_RI, torch.full((12, 12), torch.nan))
