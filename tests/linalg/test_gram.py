"""Running second moment: value, precision and monoid laws."""

import pytest
import torch
from live_bytes import LiveBytes
from matrices import gaussian

from orchestrator.errors import InputError
from orchestrator.linalg.gram import FLUSH_TOKENS, Gram

SIZES = [1, 5, 130, 300]


def chunks(count: int, n: int, tokens: int = 64) -> list[torch.Tensor]:
    return [gaussian(tokens, n, seed=seed).float() for seed in range(count)]


def gathered(n: int, pieces: list[torch.Tensor]) -> Gram:
    gram = Gram(n)
    for piece in pieces:
        gram.update(piece)
    return gram


@pytest.mark.parametrize("n", SIZES)
def test_is_the_sum_of_outer_products(n):
    """H is the sum of x x^T over all rows, to float32 rounding of products, in float64."""
    pieces = chunks(5, n)
    rows_TI = torch.cat(pieces).double()
    gram = gathered(n, pieces)
    matrix_II = gram.matrix()
    torch.testing.assert_close(matrix_II, rows_TI.T @ rows_TI, rtol=1e-5, atol=1e-5)
    assert gram.tokens == 320


@pytest.mark.parametrize("n", SIZES)
def test_is_symmetric_to_the_bit(n):
    """H equals its transpose exactly."""
    matrix_II = gathered(n, chunks(3, n)).matrix()
    assert torch.equal(matrix_II, matrix_II.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_float32_in_any_dtype(dtype):
    """Rows of every floating dtype give what their float32 values give, to the bit."""
    rows_TI = gaussian(200, 40).to(dtype)
    assert torch.equal(Gram(40).update(rows_TI).matrix(), Gram(40).update(rows_TI.float()).matrix())


def test_fresh_gram_is_the_unit():
    """Merging an empty Gram from either side, or adding no rows, changes no bit."""
    expected = gathered(40, chunks(3, 40))
    with_unit = gathered(40, chunks(3, 40)).merge(Gram(40)).update(torch.empty(0, 40))
    from_unit = Gram(40).merge(expected)
    for gram in (with_unit, from_unit):
        assert gram.tokens == expected.tokens
        assert torch.equal(gram.matrix(), expected.matrix())


def test_merging_is_associative_and_commutative():
    """In any order and grouping, merges agree to float64 rounding; arguments are not changed."""
    a, b, c = (Gram(40).update(piece) for piece in chunks(3, 40))
    before = b.matrix()
    left = Gram(40).merge(a).merge(b).merge(c)
    right = Gram(40).merge(Gram(40).merge(c).merge(b)).merge(a)
    torch.testing.assert_close(left.matrix(), right.matrix(), rtol=1e-14, atol=1e-12)
    assert left.tokens == right.tokens == 192
    assert torch.equal(b.matrix(), before)


def test_same_sequence_same_bits_however_often_it_is_read():
    """The bits depend only on updates and merges, not on reads between them."""
    pieces = chunks(6, 40, tokens=FLUSH_TOKENS // 2)
    read, unread = Gram(40), Gram(40)
    for piece in pieces:
        read.update(piece)
        read.matrix()
        unread.update(piece.clone())
    assert torch.equal(read.matrix(), unread.matrix())
    assert torch.equal(Gram(40).merge(read).matrix(), Gram(40).merge(unread).matrix())


def test_error_does_not_grow_with_tokens():
    """After 60 flushes of rows with a large mean, H is as precise as after one."""
    rows_TI = gaussian(FLUSH_TOKENS, 8).float() + 10
    exact_II = rows_TI.double().T @ rows_TI.double()
    few = gathered(8, [rows_TI])
    many = gathered(8, [rows_TI] * 60)
    error = float((few.matrix() / exact_II - 1).abs().max())
    assert error < 1e-5  # less than 1e-6 on some machines, depending on the order of sums
    assert float((many.matrix() / (60 * exact_II) - 1).abs().max()) == pytest.approx(
        error, rel=1e-6
    )


def test_long_pieces_are_flushed_in_between():
    """One long update is the same, to the bit, as its parts of `FLUSH_TOKENS` rows."""
    rows_TI = gaussian(2 * FLUSH_TOKENS + 100, 8).float()
    whole = Gram(8).update(rows_TI)
    parts = gathered(8, list(rows_TI.split(FLUSH_TOKENS)))
    assert whole.tokens == parts.tokens
    assert torch.equal(whole.matrix(), parts.matrix())


def test_non_finite_rows_are_counted():
    """A Gram with NaN or infinite rows reports the number of affected entries."""
    rows_TI = torch.zeros(3, 4)
    rows_TI[1, 2] = float("nan")
    with pytest.raises(InputError, match="Gram matrix of 3 tokens has 7 non-finite of 16 entries"):
        Gram(4).update(rows_TI).matrix()


def test_other_sizes_are_refused():
    """Rows or Grams with another number of channels are refused."""
    with pytest.raises(ValueError, match=r"rows have shape \(3, 5\), not \[tokens, 4\]"):
        Gram(4).update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="a Gram of 5 channels cannot join one of 4"):
        Gram(4).merge(Gram(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    """On a GPU the sums stay on the device and agree with the CPU to float32 rounding."""
    rows_TI = gaussian(500, 130).float()
    matrix_II = Gram(130, device="cuda").update(rows_TI.cuda()).matrix()
    assert matrix_II.is_cuda
    torch.testing.assert_close(
        matrix_II.cpu(), Gram(130).update(rows_TI).matrix(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_lose_nothing(dtype):
    """For 16-bit rows the error is that of a float32 sum, with and without tensor cores."""
    rows_TI = gaussian(2000, 130).to(dtype).cuda()
    exact_II = rows_TI.double().T @ rows_TI.double()
    found_II = Gram(130, device="cuda").update(rows_TI).matrix()
    without_II = Gram(130, device="cuda").update(rows_TI.float()).matrix()
    scale = float(exact_II.diagonal().max())
    assert float((without_II - exact_II).abs().max()) < 1e-5 * scale
    assert float((found_II - exact_II).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("n", SIZES)
def test_settling_frees_a_third_and_changes_no_bit(n):
    """`flush_writes` reduces 12 n² bytes to 8 n², keeps the bits of H, and later rows are
    refused."""
    pieces = chunks(5, n, tokens=FLUSH_TOKENS // 3)
    gram = gathered(n, pieces)
    before_II = gram.matrix()
    with LiveBytes() as live:
        gram.flush_writes()
        assert live.now == 8 * n * n + 4
    assert torch.equal(gram.matrix(), before_II)
    with pytest.raises(ValueError, match="is settled"):
        gram.update(pieces[0])


def test_reading_a_gram_takes_twice_what_it_gives():
    """Reading H peaks at H and one copy, for the mirrored triangle."""
    gram = gathered(300, chunks(2, 300))
    gram.flush_writes()
    with LiveBytes() as live:
        gram.matrix()
    held = 8 * 300 * 300
    assert 3 * held <= live.peak < 3.1 * held
