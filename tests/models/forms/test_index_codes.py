"""Index codes of sparse weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.models.forms.index_codes import (
    INDEX_CODES,
    decode,
    encode,
    index_tensors,
    is_sound,
    materialize,
)
from orchestrator.plan.forms.index_sizes import index_bytes, index_code

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 40))


@st.composite
def patterns(draw):
    """Strategy: outputs, inputs, and ascending positions of at least one entry."""
    out_features, in_features = draw(SIZES)
    elements = out_features * in_features
    positions = draw(st.sets(st.integers(0, elements - 1), min_size=1))
    return out_features, in_features, torch.tensor(sorted(positions))


def stored_bytes(tensors):
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


@pytest.mark.parametrize("code", INDEX_CODES)
@given(patterns())
def test_every_code_decodes_its_encoding(code, pattern):
    """Decoding is the inverse of encoding, and the tensors are those announced."""
    out_features, in_features, positions_N = pattern
    sizes = out_features, in_features
    tensors = encode(code, positions_N, *sizes)
    assert torch.equal(decode(code, tensors, *sizes), positions_N)
    announced = index_tensors(code, *sizes, len(positions_N))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == announced
    assert is_sound(code, tensors, *sizes, nonzeros=len(positions_N))


@pytest.mark.parametrize("code", INDEX_CODES)
@given(patterns())
def test_the_dense_weight_has_the_values_at_their_positions(code, pattern):
    """It equals assignment entry by entry; so does its gradient."""
    out_features, in_features, positions_N = pattern
    values_N = torch.arange(1.0, len(positions_N) + 1, requires_grad=True)
    tensors = encode(code, positions_N, out_features, in_features)
    weight_OI = materialize(
        code, tensors, values_N, out_features=out_features, in_features=in_features
    )
    expected_OI = [[0.0] * in_features for _ in range(out_features)]
    for value, position in enumerate(positions_N.tolist(), start=1):
        expected_OI[position // in_features][position % in_features] = value
    assert weight_OI.tolist() == expected_OI
    slope_OI = torch.randn(out_features, in_features)
    (weight_OI * slope_OI).sum().backward()
    assert torch.equal(values_N.grad, slope_OI.flatten()[positions_N])


@pytest.mark.parametrize("code", INDEX_CODES)
def test_no_shape_depends_on_data(code):
    """On the meta device, without data, the dense weight has its shape."""
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in index_tensors(code, 5, 13, 17).items()
    }
    weight_OI = materialize(
        code, tensors, torch.empty(17, device="meta"), out_features=5, in_features=13
    )
    assert weight_OI.is_meta
    assert weight_OI.shape == (5, 13)


@given(patterns())
def test_the_bytes_of_an_index_follow_from_sizes(pattern):
    """The plan's count equals the stored bytes, for every code and for the chosen one."""
    out_features, in_features, positions_N = pattern
    sizes = out_features, in_features, len(positions_N)
    found = {
        code: sum(t.nbytes for t in encode(code, positions_N, *sizes[:2]).values())
        for code in INDEX_CODES
    }
    assert found == index_bytes(*sizes)
    assert found == {code: stored_bytes(index_tensors(code, *sizes)) for code in INDEX_CODES}
    chosen = index_code(*sizes)
    assert found[chosen] == min(found.values())
    first = next(code for code in INDEX_CODES if found[code] == min(found.values()))
    assert chosen == first


@pytest.mark.parametrize(
    ("sizes", "nonzeros", "code", "size_bytes"),
    [
        ((1536, 576), 442_368, "bitmask", 110_592),  # half of a real weight
        ((1536, 576), 50_000, "columns", 106_148),
        ((1536, 576), 52_222, "bitmask", 110_592),  # 2 N + 6148 = 110592: a tie, the first wins
        ((1536, 576), 52_221, "columns", 110_590),
        ((1536, 576), 3_074, "columns", 12_296),  # 4 N is equal
        ((1536, 576), 3_073, "positions", 12_292),
        ((2, 65_536), 100, "columns", 212),
        ((2, 65_537), 100, "positions", 400),
        ((2**16, 2**15), 10**6, "columns", 2_262_148),
        ((2**16, 2**15 + 1), 100, "columns", 262_348),  # 32-bit positions would overflow
    ],
)
def test_the_smallest_code_wins(sizes, nonzeros, code, size_bytes):
    """The choice and its bytes, computed by hand."""
    assert index_code(*sizes, nonzeros) == code
    assert index_bytes(*sizes, nonzeros)[code] == size_bytes


def test_column_numbers_use_all_sixteen_bits():
    """Columns from 32768 on are restored, although they are negative as int16."""
    positions_N = torch.tensor([0, 32_767, 32_768, 65_535, 65_536 + 40_000])
    tensors = encode("columns", positions_N, 2, 65_536)
    assert int(tensors["index"].min()) < 0
    assert torch.equal(decode("columns", tensors, 2, 65_536), positions_N)


@pytest.mark.parametrize(
    ("code", "tensors"),
    [
        ("bitmask", {"index": [0b0000_0111, 0]}),
        ("bitmask", {"index": [1, 0b1000_0000]}),  # the second bit is beyond the weight
        ("positions", {"index": [3, 3]}),
        ("positions", {"index": [4, 3]}),
        ("positions", {"index": [-1, 3]}),
        ("positions", {"index": [1, 12]}),
        ("columns", {"index": [0, 1], "rows": [0, 1, 1, 1]}),
        ("columns", {"index": [0, 1], "rows": [0, 3, 1, 2]}),
        ("columns", {"index": [0, 1], "rows": [1, 1, 1, 2]}),
        ("columns", {"index": [1, 0], "rows": [0, 2, 2, 2]}),
        ("columns", {"index": [0, 4], "rows": [0, 1, 1, 2]}),
    ],
)
def test_a_damaged_index_is_detected(code, tensors):
    """Two entries of a [3, 4] weight: too many, too few, duplicated, out of order, out of range."""
    dtypes = {name: dtype for name, (dtype, _) in index_tensors(code, 3, 4, 2).items()}
    damaged = {name: torch.tensor(t, dtype=dtypes[name]) for name, t in tensors.items()}
    assert not is_sound(code, damaged, 3, 4, nonzeros=2)
