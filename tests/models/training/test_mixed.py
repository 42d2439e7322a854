"""Linears that turn from decomposed weights to what is stored: outputs, gradients and draws."""

import pytest
import torch
from compressed import some_chunks
from torch.nn.functional import linear

from orchestrator.models.forms.base import FormLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.mixed import DecomposedLinear, MixedLinears
from orchestrator.models.training.train import Training
from orchestrator.randomness import Randomness

STEPS = 8
SEED = Randomness(5)


def decomposed(model):
    """Random weights with half of their entries, for every linear in a form."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, module in model.named_modules():
        # the entries beside factors are a linear within one
        if isinstance(module, FormLinear) and name.rpartition(".")[0] not in weights:
            size = module.out_features, module.in_features
            weight_OI = torch.randn(size, generator=generator).relu() / 8
            bias = torch.randn(size[0], generator=generator) if module.bias is not None else None
            weights[name] = DecomposedLinear(weight_OI.bfloat16(), bias)
    return weights


class Mixed:
    """Model in shards, with random decomposed weights."""

    def __init__(self, directory, cut, mode="all"):
        self.shards, self.trainings, self.mixed, self.weights = [], [], [], {}
        for part in cut:
            lazy_model = LazyModel.open(directory, dtype=torch.float32)
            shard = lazy_model.shard(part)
            self.shards.append(shard)
            names = lazy_model.disk_names
            given = {"mode": mode, "weight_decay": 0.0}
            self.trainings.append(Training(shard, range(4), names, **given))
            found = decomposed(shard._empty.model)
            inside = {n: each for n, each in found.items() if shard.block(n) in part}
            self.weights |= inside
            self.mixed.append(MixedLinears(shard, inside, STEPS, SEED))

    def pass_through(self, chunk, step):
        """Logits of a step, and the gradients of their sum by name; None where there is none."""
        entered = []
        for shard, mixed in zip(self.shards, self.mixed, strict=True):
            mixed.choose(step)
            entered.append(chunk)
            chunk = chunk if shard.is_last else shard.forward(chunk)
        logits_BTV = self.shards[-1].logits(chunk)
        grads = torch.ones_like
        for shard, state in zip(self.shards[::-1], entered[::-1], strict=True):
            grads = shard.backward(state, grads)
        gradients = {}
        for training in self.trainings:
            for entries in training._by_block.values():
                for name, entry in entries.items():
                    gradients[name] = entry.gradient
                    entry.clear()
        return logits_BTV, gradients


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_step_is_that_of_decomposed_weights_and_the_last_that_of_forms(
    family, compressed
):
    """p = 1: logits of a model whose linears multiply by them, and no gradient of what a linear
    stores. p = 0: the bits and gradients without mixing, as in passes that are no step's."""
    (chunk,) = some_chunks(1)
    plain = LazyModel.open(compressed(family), dtype=torch.float32).shard(range(4))
    as_stored = plain.logits(chunk)
    found = Mixed(compressed(family), [range(4)])
    assert torch.equal(found.pass_through(chunk, None)[0], as_stored)
    whole, gradients = found.pass_through(chunk, 0)
    for name, each in found.weights.items():
        weight, bias = each.weight_OI.float(), each.bias_O
        plain.run_as(plain.module(name), lambda x, w=weight, b=bias: linear(x, w, b))
    torch.testing.assert_close(whole, plain.logits(chunk), rtol=1e-4, atol=1e-4)
    in_forms = {n for n in gradients if n.startswith(tuple(f"{m}." for m in found.weights))}
    assert {name for name, each in gradients.items() if each is None} == in_forms
    last, gradients = found.pass_through(chunk, STEPS)
    assert torch.equal(last, as_stored)
    assert all(each is not None for each in gradients.values())
    assert not any(each._weights for each in found.mixed)


@pytest.mark.parametrize("mode", ["all", "light"])
def test_a_step_trains_what_it_uses_in_any_cut(mode, compressed):
    """A linear has gradients if and only if the draw of its name and step is not below p; logits
    and gradients are the same in one shard and in two, bit for bit."""
    (chunk,), step = some_chunks(1), STEPS // 2
    one, two = (
        Mixed(compressed("llama"), cut, mode) for cut in ([range(4)], [range(2), range(2, 4)])
    )
    logits, gradients = one.pass_through(chunk, step)
    used = {name: SEED.mixed(step, name) >= 0.5 for name in one.weights}
    assert set(used.values()) == {True, False}
    for name, is_used in used.items():
        own = [g for n, g in gradients.items() if n.startswith(f"{name}.") and ".down." not in n]
        assert all((each is not None) == is_used for each in own)
    others, theirs = two.pass_through(chunk, step)
    assert torch.equal(logits, others)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        same = theirs[name]
        assert gradient is same is None or torch.equal(gradient, same), name


def test_draws_are_uniform_and_apart():
    """Over names and steps: mean 1/2, variance 1/12, no correlation between steps or seeds, each
    within five standard errors; equal words give equal numbers."""
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(4000)]
    draws = torch.tensor(
        [
            [Randomness(seed).mixed(step, n) for n in names]
            for seed, step in ((0, 3), (0, 4), (1, 3))
        ],
        dtype=torch.float64,
    )
    assert bool(((draws >= 0) & (draws < 1)).all())
    assert float((draws.mean(dim=1) - 0.5).abs().max()) < 5 * (1 / 12 / 4000) ** 0.5
    assert float((draws.var(dim=1) - 1 / 12).abs().max()) < 5 * (1 / 180 / 4000) ** 0.5
    pairs = torch.corrcoef(draws) - torch.eye(3)
    assert float(pairs.abs().max()) < 5 / 4000**0.5
    assert Randomness(0).mixed(3, names[0]) == float(draws[0, 0])
