"""Forms of other packages are compensated, refined, trained and adapted like built-in ones."""

import pytest
import torch
from compressed import some_chunks
from torch import nn
from torch.nn.functional import linear

import orchestrator.hf
from orchestrator.models.forms.base import FormLinear, ParameterScales
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.compensation import compensate_block
from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine import refine
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.models.training.train import Training
from orchestrator.randomness import Randomness

BLOCK = range(1, 2)


class TwoMatrices(FormLinear):
    """The tensors of a low-rank linear in a class of its own."""

    form = "two_matrices"
    fields = ("rank",)

    def __init__(self, other):
        super().__init__()
        self.in_features, self.out_features = other.in_features, other.out_features
        self.weight, self.down, self.bias = other.weight, other.down, other.bias

    @classmethod
    def make(cls, stored, in_features, out_features, *, shares_basis, **options):
        raise AssertionError("made from a loaded module only")

    tensors = LowRankLinear.tensors
    misfit = LowRankLinear.misfit

    def forward(self, input):
        return linear(self.down(input), self.weight, self.bias)

    def dense_weight(self):
        return self.weight @ self.down.weight

    def factored(self):
        return self

    def left_factor(self):
        return self.weight.detach()

    def right_factor(self):
        return self.down.weight.detach()

    def rest(self):
        return None

    @torch.no_grad()
    def set_factors(self, left_OR, right_RI, *, pivot):
        self.down.weight.copy_(right_RI)
        if left_OR is None:
            return {"down.weight": self.down.weight}
        return {"down.weight": self.down.weight, "weight": self.weight.copy_(left_OR)}

    @property
    def adaptable(self):
        return ("weight", "down")

    def scales(self):
        return {
            "weight": ParameterScales(
                count=self.weight.shape[1],
                spread=lambda scale_R: scale_R,
                gather=lambda values_OR: values_OR.sum(dim=0),
                gated=self.gated,
            )
        }

    def gated(self, gate, input):
        return linear(gate(self.down(input)), self.weight, self.bias)


def replace_low_rank(modules, parent_of):
    """Replace every low-rank linear with factors of its own; returns their names."""
    found = {n: m for n, m in modules if type(m) is LowRankLinear and isinstance(m.down, nn.Linear)}
    for name, module in found.items():
        path, _, child = name.rpartition(".")
        setattr(parent_of(path), child, TwoMatrices(module))
    return [*found]


def open_block(directory, *, replaced):
    """A block of the compressed model, with the form of the other package if it is asked for."""
    lazy_model = LazyModel.open(directory, dtype=torch.float32)
    shard = lazy_model.shard(BLOCK)
    if replaced:
        path = f"model.layers.{BLOCK.start}"
        modules = ((f"{path}.{n}", m) for n, m in shard.module(path).named_modules())
        assert replace_low_rank([*modules], shard.module)
    return lazy_model, shard


def refined(dense, compressed, chunks, *, replaced):
    """Tensors after refinement."""
    _, shard = open_block(compressed, replaced=replaced)
    options = RefineOptions(epochs=2, batches=2, learning_rate=1e-3, held_out=0.2)
    outputs = [dense.forward(chunk) for chunk in chunks]
    return refine(shard, chunks, outputs, options=options, randomness=Randomness(0)).tensors


def trained_lightly(dense, compressed, chunks, *, replaced):
    """Tensors after a step of light training on the squares of the block's outputs."""
    lazy_model, shard = open_block(compressed, replaced=replaced)
    names = lazy_model.disk_names
    training = Training(shard, BLOCK, names, mode="light", weight_decay=0.0)
    for chunk in chunks:
        output = shard.trace(chunk).payload.tensors()[0]
        output.square().mean().backward()
        training.collect()
    training.update(1, 1.0, 1e-2)
    return training.tensors(BLOCK.start)


def compensated(dense, compressed, chunks, *, replaced):
    """Tensors that compensation changes."""
    _, shard = open_block(compressed, replaced=replaced)
    changed, _ = compensate_block(
        dense,
        shard,
        dense_inputs=chunks,
        inputs=chunks,
        linears=[each for each in dense.linears if each.block in BLOCK],
        options=CompensationOptions(objective="blend"),
    )
    return {name: tensor.detach().clone() for name, tensor in changed.items()}


@pytest.mark.parametrize("changes", [refined, trained_lightly, compensated])
def test_the_same_tensors_in_another_form_are_changed_to_the_same_bits(
    changes, checkpoint, compressed
):
    """No stage asks for the built-in class: the form's own methods give the same result."""
    lazy_dense = LazyModel.open(checkpoint("llama"), dtype=torch.float32)
    with lazy_dense.shard(range(1)) as first:
        chunks = [first.forward(chunk) for chunk in some_chunks(5)]
    with lazy_dense.shard(BLOCK) as dense:
        expected, found = (
            changes(dense, compressed("llama"), chunks, replaced=replaced)
            for replaced in (False, True)
        )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    _, shard = open_block(compressed("llama"), replaced=True)
    path = f"model.layers.{BLOCK.start}"
    others = [n for n, m in shard.module(path).named_modules() if isinstance(m, TwoMatrices)]
    before = shard.parameters()
    for name in others:
        assert not torch.equal(found[f"{path}.{name}.weight"], before[f"{path}.{name}.weight"])


def test_a_form_whose_activations_are_not_scaled_is_trained_to_the_same_values(
    checkpoint, compressed, monkeypatch
):
    """Scales multiplied with values or with activations are one training, to rounding."""
    with LazyModel.open(checkpoint("llama"), dtype=torch.float32).shard(range(1)) as first:
        chunks = [first.forward(chunk) for chunk in some_chunks(2)]
    expected = trained_lightly(None, compressed("llama"), chunks, replaced=True)
    monkeypatch.setattr(TwoMatrices, "gated", None)
    found = trained_lightly(None, compressed("llama"), chunks, replaced=True)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", ["weight", "down"])
def test_adapters_are_for_other_forms_too(factor, compressed):
    """Targets are those of the built-in form with the same factors."""
    model = orchestrator.hf.load(compressed("llama"))
    expected = orchestrator.hf.recovery_targets(model, factor)
    assert replace_low_rank([*model.named_modules()], model.get_submodule)
    assert orchestrator.hf.recovery_targets(model, factor) == expected
