"""Passes and stages let a GPU work: no value is read and nothing is turned or cast on the host."""

import numpy as np
import pytest
import torch

from orchestrator.models.chunk import Chunk, Payload
from orchestrator.models.compensation import read_errors, squared_error


def chunk_of(states_BTC, mask_BT):
    tokens_BT = torch.zeros(mask_BT.shape, dtype=torch.int64)
    return Chunk(0, tokens_BT, mask_BT, Payload(states_BTC))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_squared_error_is_that_of_the_real_tokens(padding, dtype):
    """The sum of squares in float64 by numpy, over the tokens in the mask; what is at others may
    be anything, and the states stay as they are."""
    generator = torch.Generator().manual_seed(0)
    found_BTC = torch.randn(1, 9, 16, generator=generator)
    target_BTC = torch.randn(1, 9, 16, generator=generator).to(dtype)
    mask_BT = torch.ones(1, 9, dtype=torch.bool)
    mask_BT[:, 9 - padding :] = False
    found_BTC[~mask_BT] = torch.nan
    found, target = chunk_of(found_BTC.to(dtype), mask_BT), chunk_of(target_BTC, mask_BT)
    before = [chunk.payload.output.clone() for chunk in (found, target)]
    count, total = read_errors({5: squared_error(found, target)})[5]
    one, other = (each.double()[mask_BT].numpy() for each in before)
    assert count == (9 - padding) * 16
    assert total == pytest.approx(float(np.square(one - other).sum()), rel=1e-13)
    for chunk, state in zip((found, target), before, strict=True):
        assert torch.equal(chunk.payload.output.nan_to_num(7), state.nan_to_num(7))


def test_errors_are_read_together_and_in_their_order():
    """What comes back are the chunks' own numbers by their indices; of no chunks none."""
    errors = {index: (index + 1, torch.tensor(index / 3, dtype=torch.float64)) for index in (4, 1)}
    assert read_errors(errors) == {4: (5, 4 / 3), 1: (2, 1 / 3)}
    assert list(read_errors(errors)) == [4, 1]
    assert read_errors({}) == {}
