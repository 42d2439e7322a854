"""Use of tensor cores for float32 products: only if TF32 represents every value."""

import re
from pathlib import Path

import pytest
import torch
from pipeline import run, with_tokenizer, write_text
from torch.overrides import TorchFunctionMode

from orchestrator.linalg.tensor_cores import is_exact, tensor_cores

PACKAGE = Path(__file__).parents[2] / "orchestrator"
DROPPED_BITS = 13
"""Bits of the mantissa of float32 that TF32 lacks."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_holds_every_value_of_16_bits(dtype):
    """All 65,536 values, subnormals included, are zero in the bits that TF32 lacks."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = every.float().view(torch.int32)
    assert len(bits.unique()) > 0.98 * 2**16  # some NaNs become one NaN
    assert torch.all(bits % 2**DROPPED_BITS == 0)
    assert is_exact(dtype)
    assert is_exact(dtype, torch.bfloat16)


def test_it_does_not_hold_those_of_float32():
    """1 and the next float32 are equal in TF32, so float32 products avoid tensor cores."""
    bits = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).view(torch.int32)
    assert bits % 2**DROPPED_BITS != 0
    assert not is_exact(torch.float32)
    assert not is_exact(torch.bfloat16, torch.float32)


@pytest.fixture
def products():
    """Settings of CUDA products, restored after the test."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    yield products
    products.fp32_precision = before


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_setting_is_that_of_the_products_alone(before, products):
    """TF32 is on for exact products, off for others, and restored afterwards, also after errors."""
    products.fp32_precision = before
    with tensor_cores(torch.bfloat16, torch.float16):
        assert products.fp32_precision == "tf32"
    assert products.fp32_precision == before
    with tensor_cores(torch.bfloat16, torch.float32):
        assert products.fp32_precision == "ieee"
    with pytest.raises(RuntimeError), tensor_cores(torch.bfloat16):
        raise RuntimeError("out of memory")
    assert products.fp32_precision == before


def test_the_older_settings_cannot_be_read_inside(products):
    """PyTorch raises inside, so only products may be made there; outside both settings can be
    read."""
    older = (lambda: products.allow_tf32, torch.get_float32_matmul_precision)
    products.fp32_precision = "ieee"
    for read in older:
        read()
        mixed = pytest.raises(RuntimeError, match="mix of the legacy and new APIs")
        with mixed, tensor_cores(torch.bfloat16):
            read()
        read()


def test_nobody_here_reads_or_sets_the_older_ones():
    """The package uses only one interface for TF32."""
    older = re.compile(r"\ballow_tf32\b|float32_matmul_precision")
    found = {path.name for path in PACKAGE.rglob("*.py") if older.search(path.read_text())}
    assert found == {"tensor_cores.py"}, "it names them to say why"


class Inside(TorchFunctionMode):
    """Recorder of the functions of torch that are called while TF32 is on."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            self.called.add(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
def test_products_alone_are_made_inside(method, checkpoint, tmp_path, products):
    """A whole compression in bfloat16, with output Grams and gradients, calls only products
    inside."""
    products.fp32_precision = "ieee"
    model = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    text = write_text(tmp_path / "text.txt")
    with Inside() as inside:
        run(model, tmp_path / "out", text, method=method, dtype="bfloat16", samples=2)
    assert inside.called & {"addmm_", "linear"}
    preparing = {"float", "__get__", "__getitem__", "__len__"}
    assert inside.called <= {"addmm_", "linear", "matmul", *preparing}
