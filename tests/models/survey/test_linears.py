"""Discovery of a block's linears, their order, and the inputs that they share."""

import pytest
import torch
from moe.families import make_moe
from torch import nn
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.survey.linears import LinearCalls, check_parameters


class Block(nn.Module):
    """Block of three linears that calls them by a given function."""

    def __init__(self, run, third=None):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third = third or nn.Linear(4, 4)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def linears_of(block):
    calls = LinearCalls("blocks.0", block)
    with torch.no_grad(), calls:
        block.to("meta")(torch.empty(2, 3, 4, device="meta"))
    return calls.linears("model", 0)


def sites_of(run):
    return {linear.role: linear.site for linear in linears_of(Block(run))}


def test_one_input_is_one_site():
    """Linears that read the same tensor share a site, named after the first one called."""
    sites = sites_of(lambda block, x: block.third(block.second(x) + block.first(x)))
    assert sites == {
        "second": "blocks.0.second",
        "first": "blocks.0.second",
        "third": "blocks.0.third",
    }


def test_linears_are_in_call_order():
    """The survey lists linears in call order, not in order of declaration."""
    linears = linears_of(Block(lambda block, x: block.first(block.third(block.second(x)))))
    assert [linear.role for linear in linears] == ["second", "third", "first"]


def test_an_in_place_change_makes_another_site():
    """A tensor is a different input after it was written in place."""

    def run(block, x):
        first = block.first(x)
        x += 1
        return block.third(block.second(x) + first)

    assert len(set(sites_of(run).values())) == 3


def test_inputs_in_reused_memory_are_different_sites():
    """Inputs that use the same memory one after the other are distinct sites."""

    def run(block, x):
        return block.first(x * 1) + block.second(x * 2) + block.third(x * 3)

    assert len(set(sites_of(run).values())) == 3


def test_equal_values_in_other_memory_are_another_site():
    """A site is one tensor, not equal values; two halves of a tensor are two inputs."""

    def run(block, x):
        halves = torch.cat([x, x]).chunk(2)
        return block.first(halves[0]) + block.second(halves[1]) + block.third(x)

    assert len(set(sites_of(run).values())) == 3


@pytest.mark.parametrize(
    ("run", "times"),
    [
        (lambda block, x: block.second(block.first(x)), 0),
        (lambda block, x: block.third(block.third(block.second(block.first(x)))), 2),
        (lambda block, x: block.second(block.first(x)) @ block.third.weight.T, 0),
    ],
)
def test_a_linear_not_called_exactly_once_is_refused(run, times):
    """Linears that are never called, called twice, or used only by weight are named with the
    count."""
    with pytest.raises(InputError, match=rf"blocks\.0\.third is called {times} times"):
        linears_of(Block(run))


class Transposed(nn.Linear):
    """Linear with a transposed product, as in Falcon: the same function."""

    def forward(self, input):
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Routed(nn.Linear):
    def forward(self, input):
        return super().forward(input), 0


def chain(block, x):
    out = block.third(block.second(block.first(x)))
    return out[0] if isinstance(out, tuple) else out


def test_a_subclass_that_computes_the_same_is_a_linear():
    """A subclass of `nn.Linear` is accepted for its function, with and without bias."""
    for third in [Transposed(4, 4), Transposed(4, 4, bias=False), Conv1D(4, 4)]:
        linear = linears_of(Block(chain, third))[2]
        assert (linear.role, linear.has_bias) == ("third", third.bias is not None)


@pytest.mark.parametrize("kind", [Doubled, Routed])
def test_a_subclass_that_computes_something_else_is_refused(kind):
    """A scaled linear and a router that returns a tuple are named in the error."""
    with pytest.raises(InputError, match=rf"third is a {kind.__name__}, which does not compute"):
        linears_of(Block(chain, kind(4, 4)))


def test_the_shape_of_a_conv1d_is_outputs_by_inputs():
    """GPT-2's `Conv1D` stores [inputs, outputs]; the survey returns outputs, inputs."""
    block = Block(
        lambda block, x: block.second(block.first(x)) + block.third(x).sum(), Conv1D(6, 4)
    )
    third = next(linear for linear in linears_of(block) if linear.role == "third")
    assert (third.out_features, third.in_features) == (6, 4)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("conv", nn.Conv1d(4, 4, 3), r"blocks\.0\.conv\.weight \[4, 4, 3\]"),
        ("experts", nn.ParameterList([torch.zeros(3, 4, 5)]), r"\[3, 4, 5\] fused experts"),
        ("bare", nn.ParameterList([torch.zeros(4, 5)]), r"blocks\.0\.bare\.0 \[4, 5\] of a Param"),
    ],
)
def test_other_matrices_are_refused(name, module, message):
    """Convolutions, fused experts and bare matrices are named with their shape."""
    with pytest.raises(InputError, match=message):
        check_parameters("model", "blocks.0", nn.ModuleDict({name: module}))


def test_vectors_embeddings_and_norms_are_accepted():
    """Biases, scales, tables, norms of any shape and depthwise convolutions are accepted."""
    block = nn.ModuleDict(
        {
            "norm": nn.LayerNorm((2, 4)),
            "embedding": nn.Embedding(3, 4),
            "linear": nn.Linear(2, 2),
            "scale": nn.ParameterList([torch.zeros(4)]),
            "convolution": nn.Conv1d(4, 4, 3, groups=4),
        }
    )
    check_parameters("model", "blocks.0", block)


@pytest.fixture
def mlp():
    """Part of a block with a router of four experts, as matrix without a linear."""
    mlp = make_moe("qwen3_moe").model.layers[0].mlp
    replace_experts(mlp)
    return mlp


def test_a_router_is_no_linear(mlp):
    """A matrix or linear with a row for each expert, beside them, is accepted and not listed.

    The gate of a shared expert, with one row, is not listed either.
    """
    block = nn.ModuleDict({"mlp": mlp})
    check_parameters("model", "blocks.0", block)
    mlp.gate = nn.Linear(32, 4)
    mlp.shared_gate, mlp.other = nn.Linear(32, 1), nn.Linear(32, 5)
    check_parameters("model", "blocks.0", block)
    listed = set(LinearCalls("blocks.0", block).modules)
    assert not {"mlp.gate", "mlp.shared_gate"} & listed
    assert {"mlp.other", "mlp.experts.3.down"} < listed


def test_a_matrix_beside_experts_is_refused(mlp):
    """One with another number of rows than experts is not a router."""
    mlp.gate.weight = nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.gate\.weight \[5, 32\] of a Qwen3Moe"):
        check_parameters("model", "blocks.0", nn.ModuleDict({"mlp": mlp}))
