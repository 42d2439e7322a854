"""When float32 products may go through tensor cores: where TF32 holds every value."""

import re
from pathlib import Path

import pytest
import torch
from pipeline import run, with_tokenizer, write_text
from torch.overrides import TorchFunctionMode

from orchestrator.linalg.tensor_cores import is_exact, tensor_cores

PACKAGE = Path(__file__).parents[2] / "orchestrator"
DROPPED_BITS = 13
"""Of float32's 23 behind the binary point, those that TF32 lacks."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_holds_every_value_of_16_bits(dtype):
    """Every one of the 65,536, subnormals included, is zero where TF32 has no bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = every.float().view(torch.int32)
    assert len(bits.unique()) > 0.98 * 2**16  # some NaNs become one
    assert torch.all(bits % 2**DROPPED_BITS == 0)
    assert is_exact(dtype)
    assert is_exact(dtype, torch.bfloat16)


def test_it_does_not_hold_those_of_float32():
    """One and the next float32 are the same to TF32, so such products stay off tensor cores."""
    bits = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).view(torch.int32)
    assert bits % 2**DROPPED_BITS != 0
    assert not is_exact(torch.float32)
    assert not is_exact(torch.bfloat16, torch.float32)


@pytest.fixture
def products():
    """CUDA's products, as they were behind the test."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    yield products
    products.fp32_precision = before


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_setting_is_that_of_the_products_alone(before, products):
    """On for exact products, off for others, and as it was behind both, errors included."""
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
    """PyTorch raises, so only products may be made inside; outside both can be read."""
    older = (lambda: products.allow_tf32, torch.get_float32_matmul_precision)
    products.fp32_precision = "ieee"
    for read in older:
        read()
        mixed = pytest.raises(RuntimeError, match="mix of the legacy and new APIs")
        with mixed, tensor_cores(torch.bfloat16):
            read()
        read()


def test_nobody_here_reads_or_sets_the_older_ones():
    """The package has one interface for TF32."""
    older = re.compile(r"\ballow_tf32\b|float32_matmul_precision")
    found = {path.name for path in PACKAGE.rglob("*.py") if older.search(path.read_text())}
    assert found == {"tensor_cores.py"}, "it names them to say why"


class Inside(TorchFunctionMode):
    """Notes which functions of torch are called while TF32 is on."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            self.called.add(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
def test_products_alone_are_made_inside(method, checkpoint, tmp_path, products):
    """In a whole compression in bfloat16, with output Grams and gradients, they are."""
    products.fp32_precision = "ieee"
    model = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    text = write_text(tmp_path / "text.txt")
    with Inside() as inside:
        run(model, tmp_path / "out", text, method=method, dtype="bfloat16")
    assert inside.called & {"addmm_", "linear"}
    preparing = {"float", "__get__", "__getitem__", "__len__"}
    assert inside.called <= {"addmm_", "linear", "matmul", *preparing}
