"""The parts of `scripts/benchmark experts` that its figures depend on."""

from benchmarks.experts import KEEPS, expert_bytes
from benchmarks.experts.tiny_moe import bytes_tokenizer, make_moe, save


def test_a_token_is_a_byte():
    """The tokens of a text are its bytes in UTF-8, and decode to the text."""
    text, tokenizer = "Tokyo (東京)\n = 35° N, ½ é =", bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_of_experts_are_counted_alone(tmp_path):
    """3 blocks of 12 experts have 3 matrices of 96 x 48 values of 4 bytes each."""
    save(make_moe(0), tmp_path)
    assert expert_bytes(tmp_path) == 3 * 12 * 3 * 96 * 48 * 4


def test_default_sizes_are_whole_ranks():
    """Uniform ranks of the default sizes leave nothing of the budget unused."""
    ranks = [keep * 96 * 48 / (96 + 48) for keep in KEEPS]
    assert ranks == [19, 12]
