"""Modules of a compressed model, and the config that installs them."""

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.errors import InputError
from orchestrator.models.forms.config import read_forms
from orchestrator.models.forms.install import install_forms
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.pivoted import PivotedLinear

Q_PROJ = "model.layers.0.self_attn.q_proj"


def config(modules=None, **changes):
    low_rank = {name: {"form": "low_rank", "rank": rank} for name, rank in (modules or {}).items()}
    fields = {"quant_method": "orchestrator", "format_version": 1, "modules": low_rank}
    return {**fields, **changes}


def entry(**fields):
    return config() | {"modules": {Q_PROJ: fields}}


def meta_model(family="llama"):
    with torch.device("meta"):
        return FAMILIES[family]()


@pytest.mark.parametrize("bias", [True, False])
def test_a_low_rank_linear_is_the_product_of_its_factors(bias):
    """It maps x to W D x + b, in values and in gradients."""
    module = LowRankLinear(7, 5, 3, bias=bias, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    dense = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    dense.weight = nn.Parameter(module.weight.detach() @ module.down.weight.detach())
    if bias:
        dense.bias = nn.Parameter(module.bias.detach())
    x_TI = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(module(x_TI), dense(x_TI))
    module(x_TI).square().sum().backward()
    dense(x_TI).square().sum().backward()
    torch.testing.assert_close(
        module.weight.grad, dense.weight.grad @ module.down.weight.detach().T
    )


def test_its_tensors_have_the_names_of_the_format():
    """The first factor has the dense weight's name; the module is not an `nn.Linear`."""
    module = LowRankLinear(7, 5, 3)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {"weight": (5, 3), "down.weight": (3, 7), "bias": (5,)}
    assert (module.in_features, module.out_features, module.rank) == (7, 5, 3)
    assert not isinstance(module, nn.Linear)


def some_pivoted(inputs, outputs, rank, **options):
    """Make a pivoted linear with random values and another order of its rows."""
    module = PivotedLinear(inputs, outputs, rank, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.index.copy_(torch.arange(outputs).roll(rank // 2))
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_a_pivoted_linear_orders_its_rows_by_the_index(bias):
    """It maps x to [D; W D] x + b with rows ordered by the index, in values and in gradients."""
    module = PivotedLinear(7, 5, 3, bias=bias, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    order = [3, 0, 2, 4, 1]
    module.index.copy_(torch.tensor(order))
    down, weight = module.down.weight.detach(), module.weight.detach()
    rows = [*down, *(weight @ down)]
    dense = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    dense.weight = nn.Parameter(torch.stack([rows[place] for place in order]))
    if bias:
        dense.bias = nn.Parameter(module.bias.detach())
    torch.testing.assert_close(module.dense_weight(), dense.weight)
    x_TI = torch.randn(2, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(module(x_TI), dense(x_TI))
    module(x_TI).square().sum().backward()
    dense(x_TI).square().sum().backward()
    others = dense.weight.grad[[order.index(3), order.index(4)]]
    torch.testing.assert_close(module.weight.grad, others @ down.T)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    biases = {"bias": (5,)} if bias else {}
    assert shapes == {"weight": (2, 3), "down.weight": (3, 7), "index": (5,)} | biases
    assert (module.index.dtype, module.is_sound()) == (torch.int32, True)


class Operations(TorchDispatchMode):
    """Records the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::").rstrip("_"))
        return func(*args, **(kwargs or {}))


def test_the_backward_of_a_pivoted_linear_gathers():
    """First and second gradients are right; no operation of the backward pass adds by index,
    because a GPU does not fix the order of such sums."""
    module = PivotedLinear(7, 5, 3, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.index.copy_(torch.tensor([3, 0, 2, 4, 1]))
    x_TI = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x_TI)
    assert torch.autograd.gradgradcheck(module, x_TI)
    with Operations() as operations:
        module(x_TI).square().sum().backward()
    assert "index_select" in operations.names
    assert not {"index_add", "scatter_add", "index_put"} & operations.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pivoted_linear_copies_its_outputs_once_without_gradients(dtype, bias):
    """Two products into one output and one selection, with the bits of the way with gradients;
    16-bit values are concatenated on a CPU."""
    module = some_pivoted(70, 50, 30, bias=bias, dtype=dtype)
    x_BTI = torch.randn(2, 9, 70).to(dtype)
    expected = module(x_BTI)
    with torch.no_grad(), Operations() as operations:
        found = module(x_BTI)
    assert torch.equal(found, expected.detach())
    copies = {"cat", "copy", "clone"} & operations.names
    assert bool(copies) == (dtype is torch.bfloat16)
    # products of one row have another order
    tolerance = (1e-2 if dtype is torch.bfloat16 else 1e-6) * float(found.abs().max())
    with torch.inference_mode():
        one_row = module(x_BTI[:1, :1])
        torch.testing.assert_close(one_row, found[:1, :1], rtol=0, atol=tolerance)
        assert module(x_BTI[:, :0]).shape == (2, 0, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_pivoted_linear_reads_nothing_that_it_has_not_written(dtype, monkeypatch):
    """With not a number in all new memory the outputs are finite, and those of one product with
    the dense weight: a CPU's products of 16-bit values read beyond slices."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for outputs, rank in ((192, 100), (1536, 464), (96, 80)):
        module = some_pivoted(576, outputs, rank, bias=False, dtype=dtype)
        x_TI = torch.randn(64, 576).to(dtype)
        expected = x_TI.double() @ module.double().dense_weight().T
        module.to(dtype)
        torch.use_deterministic_algorithms(True)
        try:
            found = module(x_TI)
        finally:
            torch.use_deterministic_algorithms(False)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 8 * torch.finfo(dtype).eps


@torch.no_grad()
def test_a_pivoted_linear_whose_pivots_are_changed_calls_what_changes_them():
    """A hook, another class or a function in the place of the pivots' linear, and autocast."""
    x_TI = torch.randn(4, 7)
    module = some_pivoted(7, 5, 3, bias=False)
    plain = module(x_TI)
    doubled = torch.nn.functional.linear(2 * x_TI, module.dense_weight())
    hook = module.down.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    torch.testing.assert_close(module(x_TI), doubled)
    hook.remove()
    assert torch.equal(module(x_TI), plain)
    forward = module.down.forward
    module.down.forward = lambda x_TI: forward(2 * x_TI)
    torch.testing.assert_close(module(x_TI), doubled)
    del module.down.forward
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x_TI).dtype == torch.bfloat16
    module.down = nn.Sequential(module.down, nn.Identity())
    torch.testing.assert_close(module(x_TI), plain)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 3], [0, 1, 2, 3, 5], [-1, 0, 1, 2, 3]])
def test_an_invalid_order_is_detected(order):
    """A position twice, one beyond the last, one before the first."""
    module = PivotedLinear(7, 5, 3)
    module.index.copy_(torch.tensor(order))
    assert not module.is_sound()


@pytest.mark.parametrize(
    ("family", "name", "shapes"),
    [
        ("llama", Q_PROJ, {"weight": (32, 5), "down.weight": (5, 32)}),
        ("qwen2", Q_PROJ, {"weight": (32, 5), "down.weight": (5, 32), "bias": (32,)}),
        (
            "gpt2",
            "transformer.h.1.attn.c_attn",
            {"weight": (96, 5), "down.weight": (5, 32), "bias": (96,)},
        ),
    ],
)
def test_installing_replaces_the_named_modules_and_no_others(family, name, shapes):
    """A linear or a Conv1D becomes factors of its own shape, on the meta device, with its bias."""
    model = meta_model(family)
    before = dict(model.named_modules())
    install_forms(model, config({name: 5}))
    after = dict(model.named_modules())
    assert {key for key in before if after[key] is not before[key]} == {name}
    state = after[name].state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    assert all(tensor.is_meta for tensor in state.values())


def test_a_model_without_head_accepts_the_same_config():
    """Module names may lack the base model's prefix."""
    model = meta_model()
    install_forms(model.model, config({Q_PROJ: 5}))
    assert isinstance(model.model.layers[0].self_attn.q_proj, LowRankLinear)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(quant_method="gptq"), "found 'gptq', need 'orchestrator'"),
        (config(format_version=4), "found 4, this program reads 1 to 3; load it with"),
        (config(format_version=3), "router: found None, need 'reduced'"),
        (config(format_version=2), "experts: found None, need an object"),
        (config(experts={}), "unknown field 'experts'"),
        (config(format_version=True), "found True, this program reads 1"),
        (config(format_version=None), "found None"),
        (config(modules_=1), "unknown field 'modules_'"),
        ({"quant_method": "orchestrator", "format_version": 1}, "found None, need an object"),
        (config() | {"modules": ["a"]}, "need an object"),
        (config() | {"modules": {Q_PROJ: 5}}, "found 5, need"),
        (config() | {"modules": {Q_PROJ: {"form": "os.system", "rank": 5}}}, "need"),
        (config() | {"modules": {Q_PROJ: {"form": "low_rank", "rank": 5, "x": 1}}}, "need"),
        (config({Q_PROJ: "5"}), "found '5', need a whole number"),
        (config({Q_PROJ: 5.0}), "found 5.0, need a whole number"),
        (config({Q_PROJ: True}), "found True, need a whole number"),
        (config({Q_PROJ: 0}), r"found rank 0 for low_rank, a \[32, 32\] linear takes 1 or more"),
        (config({Q_PROJ: -3}), "found rank -3"),
        (config({Q_PROJ: 16}), r"found rank 16, a \[32, 32\] linear takes 1 to 15"),
        (config({Q_PROJ: 10**30}), r"found 1000.*, need one below 2\^63"),
        (entry(form="pivoted", rank=0), "found rank 0 for pivoted"),
        (
            entry(form="pivoted", rank=32),
            r"found rank 32, pivoted a \[32, 32\] linear takes 1 to 31",
        ),
        (entry(form="pivoted", rank=3, basis="x"), "need a form"),
        (entry(form="sparse", nonzeros=5), "need a form: .* sparse with nonzeros, index"),
        (entry(form="sparse", nonzeros=5, index="bitmask", basis="x"), "need a form"),
        (entry(form="sparse", nonzeros="5", index="bitmask"), "found '5', need a whole number"),
        (entry(form="sparse", nonzeros=5, index=3), "found 3, need a name"),
        (entry(form="sparse", nonzeros=5, index="zip"), "takes bitmask, columns, positions"),
        (entry(form="sparse", nonzeros=0, index="bitmask"), "found nonzeros 0 for sparse"),
        (entry(form="sparse", nonzeros=1024, index="bitmask"), r"\[32, 32\] linear has 1024"),
        (
            entry(form="low_rank_sparse", rank=15, nonzeros=64, index="bitmask"),
            "found rank 15 and 64 nonzeros, which store 1024 values",
        ),
        (entry(form="low_rank", rank=3, basis="x"), "found basis 'x', need a low_rank linear"),
        (entry(form=["low_rank"], rank=3), "need a form"),
        (config({"model.layers.9.self_attn.q_proj": 5}), "found no such module"),
        (config({"__class__": 5}), "found no such module"),
        (config({"": 5}), "found a LlamaForCausalLM"),
        (config({"model.norm": 5}), "found a LlamaRMSNorm"),
        (config({"model.embed_tokens": 5}), "found a Embedding"),
    ],
)
def test_an_invalid_config_is_refused_in_one_line(given, message):
    """Any content of a config.json gives an InputError that states what was found."""
    with pytest.raises(InputError, match=message) as caught:
        install_forms(meta_model(), given)
    assert "\n" not in str(caught.value)


def test_a_tied_weight_stays_dense():
    """A head that shares its weight with the embedding cannot have factors."""
    with pytest.raises(InputError, match="tied to another"):
        install_forms(meta_model("llama_tied"), config({"lm_head": 5}))


def test_ranks_come_in_the_order_of_the_config():
    """Reading needs no model."""
    forms = read_forms(config({"b": 2, "a": 1}))
    assert [(name, form.rank) for name, form in forms.items()] == [("b", 2), ("a", 1)]


@pytest.mark.parametrize("producer", ["orchestrator 0.1.0", {"name": "orchestrator"}])
def test_any_producer_is_read(producer):
    """Configs of earlier versions have a string."""
    assert list(read_forms(config({"a": 1}, producer=producer))) == ["a"]
