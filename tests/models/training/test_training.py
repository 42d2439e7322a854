"""Training of a shard's blocks: gradients, AdamW steps, and the three modes."""

import gc
from functools import cache

import pytest
import torch
from compressed import some_chunks
from sharded import whole_model
from torch.nn.functional import cross_entropy, log_softmax

import orchestrator.hf  # noqa: F401 # a compressed checkpoint is loaded whole
from orchestrator.errors import InfeasibleError
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.sparse import SparseLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.distill import LossWeights, distill
from orchestrator.models.training.train import MOMENTS, Training, _squared_norms
from orchestrator.models.training.train_options import TrainOptions, plan_course
from orchestrator.randomness import Randomness

FAMILIES = ["llama", "gemma2", "gpt2", "opt", "falcon", "phi3"]
WEIGHTS = LossWeights(divergence=0.6 / 40, cross_entropy=0.4 / 37)
CUTS = ([range(4)], [range(2), range(2, 4)])
"""Cuts of four blocks, each two of which share a basis."""


@cache
def dense_logits(directory, count):
    """Logits of the dense model for the first chunks."""
    with LazyModel.open(directory, dtype=torch.float32).shard(range(4)) as shard:
        return [shard.logits(chunk) for chunk in some_chunks(count)]


class Model:
    """Model in shards that are all loaded, each from its own lazy model."""

    def __init__(self, directory, cut, mode="all", blocks=range(4), decay=0.01):
        self.shards, self.trainings = [], []
        for part in cut:
            lazy_model = LazyModel.open(directory, dtype=torch.float32)
            self.shards.append(lazy_model.shard(part))
            names = lazy_model.disk_names
            self.trainings.append(
                Training(self.shards[-1], blocks, names, mode=mode, weight_decay=decay)
            )

    def accumulate(self, chunk, targets):
        """Add the gradients of a chunk, block by block from the last to the first."""
        entered = []
        for shard in self.shards:
            for block in shard.blocks:
                entered.append((shard, block, chunk))
                if block < 3:
                    chunk = shard.forward(chunk, part=range(block, block + 1))

        def grads(logits_BTV):
            given = logits_BTV, chunk.tokens, chunk.mask, targets
            return distill(*given, temperature=1.0, weights=WEIGHTS)[1]

        for shard, block, state in entered[::-1]:
            grads = shard.backward(state, grads, part=range(block, block + 1))
            for training in self.trainings:
                training.collect()

    def gradients(self):
        found = {}
        for training in self.trainings:
            for entries in training._by_block.values():
                found |= {name: entry.gradient for name, entry in entries.items()}
        return found

    def norms(self):
        return {b: norm for training in self.trainings for b, norm in training.norms().items()}

    def update(self, *arguments):
        for training in self.trainings:
            training.update(*arguments)

    def state(self):
        return {
            n: t for each in self.trainings for b in each.blocks for n, t in each.state(b).items()
        }

    def load(self, tensors):
        for training in self.trainings:
            for block in training.blocks:
                training.load(block, tensors)

    def tensors(self):
        return {
            n: t for each in self.trainings for b in each.blocks for n, t in each.tensors(b).items()
        }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def plain_gradients(directory, chunks, targets):
    """Gradients of the plain loss by autograd through the whole transformers model."""
    model, total = whole_model(directory, torch.float32), 0.0
    for chunk, theirs in zip(chunks, targets, strict=True):
        found = model(input_ids=chunk.tokens, attention_mask=chunk.mask.long()).logits
        q, p = log_softmax(found, dim=-1), log_softmax(theirs, dim=-1)
        kl_BT = (p.exp() * (p - q)).sum(dim=-1)
        both_BT = chunk.mask[:, :-1] & chunk.mask[:, 1:]
        ce = cross_entropy(found[:, :-1][both_BT], chunk.tokens[:, 1:][both_BT], reduction="sum")
        total = total + WEIGHTS.divergence * kl_BT[chunk.mask].sum() + WEIGHTS.cross_entropy * ce
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family, checkpoint, compressed):
    """All parameters of a whole step, to 1e-5 of the largest value; shared bases included."""
    chunks = some_chunks(2)
    targets = dense_logits(checkpoint(family), 2)
    expected = plain_gradients(compressed(family), chunks, targets)
    model = Model(compressed(family), CUTS[1])
    for chunk, theirs in zip(chunks, targets, strict=True):
        model.accumulate(chunk, theirs)
    found = model.gradients()
    shared = [name for name in found if name.endswith("down.weight") and ".0." in name]
    assert shared
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * largest)
    total = sum(expected[name].double().square().sum() for name in found)
    assert sum(model.norms().values()) == pytest.approx(float(total), rel=1e-5)


def trained(directory, targets, chunks, cut, mode="all", steps=3, state=None, first=1):
    model = Model(directory, cut, mode)
    if state is not None:
        model.load(state)
    for number in range(first, first + steps):
        for chunk, theirs in zip(chunks, targets, strict=True):
            model.accumulate(chunk, theirs)
        model.update(number, 0.5, 1e-2)
    return model


@cache
def trained_whole(directory, dense, mode):
    """State and tensors after three steps in one shard."""
    model = trained(directory, dense_logits(dense, 2), some_chunks(2), CUTS[0], mode)
    return model.state(), model.tensors()


@pytest.mark.parametrize("mode", ["all", "lean", "light"])
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_the_cut_changes_no_bit(family, mode, checkpoint, compressed):
    """Values and moments of every block are the same in one shard and in two."""
    directory, targets = compressed(family), dense_logits(checkpoint(family), 2)
    two = trained(directory, targets, some_chunks(2), CUTS[1], mode)
    state, tensors = trained_whole(directory, checkpoint(family), mode)
    assert_same(state, two.state())
    assert_same(tensors, two.tensors())


@pytest.mark.parametrize("mode", ["all", "lean", "light"])
def test_a_state_continues_in_another_cut(mode, checkpoint, compressed):
    """Two steps and a third from their state in another cut equal three steps, bit for bit."""
    directory, chunks = compressed("llama"), some_chunks(2)
    targets = dense_logits(checkpoint("llama"), 2)
    state = trained(directory, targets, chunks, CUTS[0], mode, steps=2).state()
    later = trained(directory, targets, chunks, CUTS[1], mode, steps=1, state=state, first=3)
    whole_state, whole_tensors = trained_whole(directory, checkpoint("llama"), mode)
    assert_same(whole_state, later.state())
    assert_same(whole_tensors, later.tensors())


def test_norms_of_large_gradients_are_those_of_float64():
    """For 2^22 equal values the norm is n x² to 1e-10; a float32 sum is off by more than 1e-3."""
    value = float(torch.tensor(0.1))
    tensors = [torch.full((2**11, 2**11), 0.1), torch.full((3,), 0.1), torch.zeros(0)]
    expected = [2**22 * value**2, 3 * value**2, 0.0]
    assert _squared_norms(tensors) == pytest.approx(expected, rel=1e-10)
    assert float(torch.linalg.vector_norm(tensors[0])) ** 2 != pytest.approx(expected[0], rel=1e-3)
    assert _squared_norms([]) == []


def test_steps_are_those_of_torch_adamw(checkpoint, compressed):
    """Given the same gradients, values and moments are bit for bit those of torch.optim.AdamW."""
    directory, chunks = compressed("llama"), some_chunks(1)
    targets = dense_logits(checkpoint("llama"), 1)
    model = Model(directory, CUTS[0])
    copies = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in model.tensors().items()}
    reference = torch.optim.AdamW(copies.values(), weight_decay=0.01)
    for number in range(1, 4):
        model.accumulate(chunks[0], targets[0])
        for name, gradient in model.gradients().items():
            copies[name].grad = gradient * 0.25
        reference.param_groups[0]["lr"] = rate = 1e-3 * number
        reference.step()
        model.update(number, 0.25, rate)
    state = model.state()
    for name, copy in copies.items():
        assert torch.equal(state[f"value.{name}"], copy), name
        for moment in MOMENTS:
            assert torch.equal(state[f"{moment}.{name}"], reference.state[copy][moment]), name


def test_lean_moments_are_rounded_and_still_decay(checkpoint, compressed):
    """They take two bytes, the first step equals float32, and without gradients v decays."""
    directory, chunks = compressed("llama"), some_chunks(1)
    targets = dense_logits(checkpoint("llama"), 1)
    lean, full = (trained(directory, targets, chunks, CUTS[0], m, steps=1) for m in ("lean", "all"))
    for name, tensor in lean.tensors().items():
        torch.testing.assert_close(tensor, full.tensors()[name], rtol=1e-5, atol=1e-6)
    before = {n: t for n, t in lean.state().items() if n.startswith("exp_avg_sq")}
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    for number in range(2, 12):
        for entries in lean.trainings[0]._by_block.values():
            for entry in entries.values():
                entry.parameter.grad = torch.zeros_like(entry.parameter)
        lean.update(number, 1.0, 1e-4)
    for name, tensor in before.items():
        real = tensor > 1e-30
        assert bool((lean.state()[name][real] < 0.95 * tensor[real]).all()), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_light_trains_scales_norms_and_biases(family, checkpoint, compressed):
    """A scale's gradient is that of the weight along itself; right factors stay bit for bit."""
    directory, chunks = compressed(family), some_chunks(1)
    targets = dense_logits(checkpoint(family), 1)
    light, whole = (Model(directory, CUTS[0], mode) for mode in ("light", "all"))
    before = light.tensors()
    for model in (light, whole):
        model.accumulate(chunks[0], targets[0])
    found, expected = light.gradients(), whole.gradients()
    assert found.keys() < expected.keys()
    parameters = light.shards[0].parameters()
    matrices = [each for name, each in parameters.items() if name in expected and each.dim() > 1]
    assert matrices
    assert not any(each.requires_grad or each.grad is not None for each in matrices)
    assert not any(name.endswith("down.weight") for name in found)
    forms = set()
    for name, gradient in found.items():
        module = light.shards[0].module(name.rpartition(".")[0])
        product = expected[name] * before[name]
        if name.endswith("weight") and isinstance(module, LowRankLinear):
            product = product.sum(dim=0)
        elif isinstance(module, SparseLinear) and name.endswith("weight"):
            dense_OI = module.dense_weight().detach()
            rows_N = (dense_OI != 0).nonzero()[:, 0]
            product = torch.zeros(len(dense_OI)).index_add_(0, rows_N, product)
        else:
            product = expected[name]
        forms.add(type(module).__name__)
        torch.testing.assert_close(gradient, product, rtol=1e-4, atol=1e-6)
    assert forms >= {"LowRankLinear", "SparseLinear", "PivotedLinear", "LowRankSparseLinear"}
    light.update(1, 1.0, 1e-2)
    after = light.tensors()
    for name, tensor in after.items():
        module = light.shards[0].module(name.rpartition(".")[0])
        if name.endswith("weight") and isinstance(module, LowRankLinear):
            ratio_OR = tensor / before[name]
            ratio_R = ratio_OR.nanmedian(dim=0).values
            torch.testing.assert_close(tensor, before[name] * ratio_R, rtol=1e-5, atol=1e-7)
            assert not torch.equal(tensor, before[name])
    numbers = sum(light.trainings[0].num_parameters.values())
    assert numbers < 0.2 * sum(whole.trainings[0].num_parameters.values())


def held_bytes():
    """Total bytes of the tensors that Python holds."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = (each.untyped_storage() for each in found)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def test_light_holds_bytes_for_scales_and_none_for_factors(checkpoint, compressed):
    """Between steps, beside the weights: 12 a scale (16 with its gradient in a step), 8 a number
    that is trained directly, and 8 for the number of entries of an output."""
    (chunk,), targets = some_chunks(1), dense_logits(checkpoint("llama"), 1)
    lazy_model = LazyModel.open(compressed("llama"), dtype=torch.float32)
    shard, names = lazy_model.shard(range(4)), lazy_model.disk_names
    own = shard.own_parameters()
    before = held_bytes()
    training = Training(shard, range(4), names, mode="light", weight_decay=0.0)
    shard.backward(chunk, lambda logits_BTV: logits_BTV - targets[0])
    training.collect()
    training.update(1, 1.0, 1e-3)
    added = held_bytes() - before
    direct = sum(each.numel() for each in own.values() if each.requires_grad)
    scales = sum(training.num_parameters.values()) - direct
    linears = {name: shard.compressed_linear(name) for name in own}
    sparse = {path: each for path, each in filter(None, linears.values()) if each.form == "sparse"}
    assert added == 12 * scales + 8 * direct + 8 * sum(e.out_features for e in sparse.values())
    assert added < sum(each.numel() for each in own.values() if each.dim() > 1)


def test_blocks_not_named_are_not_trained(checkpoint, compressed):
    """Blocks not named have no gradients, no state, and no part in the norm."""
    chunks = some_chunks(1)
    targets = dense_logits(checkpoint("llama"), 1)
    model = Model(compressed("llama"), CUTS[0], blocks=(1, 2))
    model.accumulate(chunks[0], targets[0])
    norms = model.norms()
    assert norms[0] == norms[3] == 0
    assert norms[1] > 0
    assert model.trainings[0].blocks == [1, 2]
    for name, parameter in model.shards[0].parameters().items():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_course_uses_every_sequence_once_per_epoch():
    """Batches differ by at most one sequence, orders by epoch and seed; held-out ones are left
    out."""
    options = TrainOptions(epochs=3, batches=7, every=5)
    course = plan_course(options, 32, Randomness(0))
    assert course.held_out == (4, 12, 20, 28)
    assert course.steps == 21
    assert {len(batch) for batch in course.batches} == {4}
    epochs = [sum(course.batches[7 * e : 7 * e + 7], ()) for e in range(3)]
    assert all(sorted((*epoch, 4, 12, 20, 28)) == list(range(32)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert plan_course(options, 32, Randomness(1)).batches != course.batches
    assert [course.following(step) for step in (0, 5, 20, 21)] == [5, 10, 21, 21]


def test_lack_of_memory_is_reported_before_the_start(compressed):
    """Gradients and moments take 12, 8 and almost no bytes per value; less room is infeasible."""
    need = {}
    for mode in ("all", "lean", "light"):
        (training,) = Model(compressed("llama"), CUTS[0], mode).trainings
        need[mode] = training.extra_bytes
        training.check_room(need[mode])
        with pytest.raises(InfeasibleError, match="more workers"):
            training.check_room(need[mode] - 1)
        if mode != "lean":
            assert need[mode] == 12 * sum(training.num_parameters.values())
    assert need["lean"] * 12 == need["all"] * 8
    assert need["light"] < need["all"] / 4
