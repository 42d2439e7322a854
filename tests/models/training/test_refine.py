"""Training of blocks towards the outputs of the dense blocks."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import cos, pi

import pytest
import torch
from compressed import compress, plan_of, some_chunks
from sharded import whole_model
from torch.nn.utils import clip_grad_norm_

import orchestrator.hf  # noqa: F401 # a compressed checkpoint is loaded whole
from orchestrator.errors import UsageError
from orchestrator.models.forms.sparse import SparseLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.refine import Refinement, merge, refine, trained_parameters
from orchestrator.models.training.refine_ledger import Ledger
from orchestrator.models.training.refine_options import RefineOptions, rate, split
from orchestrator.plan.plan import Assignment
from orchestrator.randomness import Randomness

FAMILIES = ["llama", "gemma2", "gpt2", "opt", "falcon"]
SHORT = RefineOptions(epochs=3, batches=2, learning_rate=1e-3, held_out=0.2)


def passed(lazy_model, blocks, chunks):
    with lazy_model.shard(blocks) as shard:
        return [shard.forward(chunk) for chunk in chunks]


@cache
def ends_of_block(directory, block, count, dtype):
    lazy_model, chunks = LazyModel.open(directory, dtype=dtype), some_chunks(count)
    inputs = passed(lazy_model, range(block), chunks) if block else chunks
    return inputs, passed(lazy_model, range(block, block + 1), inputs)


def dense_ends(directory, block, count=5, dtype=torch.float32):
    """Inputs and outputs of a block of the dense model, in lists that may be changed."""
    inputs, outputs = ends_of_block(directory, block, count, dtype)
    return [*inputs], [*outputs]


def refined(directory, ends, block, options=SHORT, seed=0, dtype=torch.float32):
    with LazyModel.open(directory, dtype=dtype).shard(range(block, block + 1)) as shard:
        return refine(shard, *ends, options=options, randomness=Randomness(seed))


@pytest.fixture(scope="module")
def plain(checkpoint, compressed):
    """Result for block 1 of the Llama."""
    return refined(compressed("llama"), dense_ends(checkpoint("llama"), 1), 1)


def with_state(chunk, change):
    """Copy of the chunk with other hidden states."""
    return chunk.with_payload(chunk.payload.map(change))


def assert_same(one, other):
    assert one.facts() == other.facts()
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_a_plain_loop_over_the_whole_model(checkpoint, compressed, family):
    """Three steps equal those of stock AdamW on the model loaded whole, in float64, to 1e-9."""
    directory, dtype = compressed(family), torch.float64
    options = replace(SHORT, batches=1, held_out=0.3, clip=0.01, warm_up=0.4)
    _, targets = dense_ends(checkpoint(family), 1, count=3, dtype=dtype)
    lazy_model, chunks = LazyModel.open(directory, dtype=dtype), some_chunks(3)
    inputs = passed(lazy_model, range(1), chunks)
    result = refined(directory, (inputs, targets), 1, options, dtype=dtype)

    model = whole_model(directory, dtype)
    blocks = model.get_submodule(lazy_model.prefix)
    left, names = [], [name for name in result.tensors if f"{lazy_model.prefix}.1." in name]
    assert names == list(result.tensors)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = [parameters[name] for name in names]
    blocks[1].register_forward_hook(lambda module, args, output: left.append(output))

    def error(index):
        chunk = chunks[index]
        model(input_ids=chunk.tokens, attention_mask=chunk.mask.long())
        output = left.pop()
        found_BTC = output[0] if isinstance(output, tuple) else output
        gap_BTC = found_BTC - targets[index].payload.tensors()[0]
        return gap_BTC[chunk.mask].square().mean(), int(chunk.mask.sum())

    optimizer = torch.optim.AdamW(trained, weight_decay=options.weight_decay)
    for step, epoch in enumerate(result.epochs):
        pairs = [error(index) for index in (0, 2)]
        tokens = sum(count for _, count in pairs)
        loss = sum(value * count for value, count in pairs) / tokens
        optimizer.zero_grad()
        model.zero_grad()
        loss.backward()
        norm = clip_grad_norm_([each for each in trained if each.grad is not None], 0.01)
        optimizer.param_groups[0]["lr"] = rate(step, 3, options)
        optimizer.step()
        torch.testing.assert_close(torch.tensor(epoch.train).double(), loss.detach())
        torch.testing.assert_close(torch.tensor(epoch.gradient).double(), norm.double())
        with torch.no_grad():
            held_out, _ = error(1)
        torch.testing.assert_close(torch.tensor(epoch.held_out).double(), held_out)
    assert result.best == 3
    for name in names:
        expected = parameters[name].detach()
        torch.testing.assert_close(result.tensors[name], expected, rtol=1e-9, atol=1e-9)


def test_a_shift_that_a_bias_can_represent_is_learnt(checkpoint):
    """Targets equal to the block's outputs plus a constant are reached; the least error is 0."""
    dense = LazyModel.open(checkpoint("gpt2"))
    survey = dense.survey()
    whole = plan_of(survey, {each.name: Assignment(form="dense") for each in survey.linears})
    inputs, outputs = dense_ends(checkpoint("gpt2"), 2)
    shift_C = torch.linspace(-0.3, 0.3, 32)
    targets = [with_state(chunk, lambda state_BTC: state_BTC + shift_C) for chunk in outputs]
    options = RefineOptions(epochs=60, learning_rate=1e-2, weight_decay=0, held_out=0.2)

    def read(spec):
        return dense.weights.read(spec.source)

    with dense.planned(whole, read).shard(range(2, 3)) as shard:
        result = refine(shard, inputs, targets, options=options, randomness=Randomness(0))
    assert {name.rpartition(".")[2] for name in result.tensors} == {"bias", "weight"}
    assert result.start == pytest.approx(float(shift_C.square().mean()), rel=1e-5)
    assert result.epochs[result.best - 1].held_out < 5e-3 * result.start


def test_the_best_state_is_restored_not_the_last(checkpoint, compressed):
    """If only the held-out chunks fit from the start, the initial state is kept bit for bit."""
    directory = compressed("llama")
    inputs, targets = dense_ends(checkpoint("llama"), 1)
    _, (held_out,) = split(5, SHORT.held_out)
    with LazyModel.open(directory).shard(range(1, 2)) as shard:
        before = {name: p.detach().clone() for name, p in shard.parameters().items()}
        targets[held_out] = shard.forward(inputs[held_out])
        result = refine(
            shard,
            inputs,
            targets,
            options=replace(SHORT, epochs=9, patience=2),
            randomness=Randomness(0),
        )
        after = shard.parameters()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(p.requires_grad and p.grad is None for p in after.values())
    assert (result.best, result.start, result.stop) == (0, 0, "patience")
    assert len(result.epochs) == 2
    assert result.steps == 4
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, before[name])


def test_the_shard_is_left_with_the_best_state(checkpoint, compressed):
    """Its held-out loss, recomputed, is the smallest of all epochs."""
    directory, ends = compressed("llama"), dense_ends(checkpoint("llama"), 1)
    with LazyModel.open(directory).shard(range(1, 2)) as shard:
        result = refine(
            shard,
            *ends,
            options=replace(SHORT, epochs=6, learning_rate=0.05),
            randomness=Randomness(0),
        )
        with Refinement(shard, *ends, options=SHORT, randomness=Randomness(0)) as again:
            losses = [result.start, *(epoch.held_out for epoch in result.epochs)]
            assert again.result().start == min(losses) == losses[result.best]
        for name, parameter in shard.parameters().items():
            assert name not in result.tensors or torch.equal(parameter, result.tensors[name])


def test_bits_do_not_depend_on_other_random_numbers(checkpoint, compressed, plain):
    """The bits depend only on seed and block; another seed gives other bits."""
    directory, ends = compressed("llama"), dense_ends(checkpoint("llama"), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        state = torch.get_rng_state()
        again = refined(directory, ends, 1)
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(again, plain)
    other = refined(directory, ends, 1, seed=1)
    assert other.epochs != plain.epochs


@pytest.mark.parametrize("slices", [1, 2, 3, 8])
def test_replicas_that_divide_the_slices_have_the_same_bits(checkpoint, compressed, slices):
    """Two replicas with half of the slices and held-out chunks each give the bits of one."""
    directory, ends = compressed("llama"), dense_ends(checkpoint("llama"), 1, count=8)
    options = replace(SHORT, batches=1, slices=slices, held_out=0.3)
    ledger, skeletons = Ledger(8, options), [LazyModel.open(directory) for _ in range(2)]
    assert ledger.parts(0) == min(slices, 6)
    with ExitStack() as stack:
        shards = [stack.enter_context(each.shard(range(1, 2))) for each in skeletons]
        made = [
            Refinement(shard, *ends, options=options, randomness=Randomness(0)) for shard in shards
        ]
        replicas = [stack.enter_context(each) for each in made]

        def evaluate():
            places = range(len(ledger.held_out))
            return ledger.evaluated([replicas[place % 2].error(place) for place in places])

        evaluate()
        while ledger.stop is None:
            epoch = len(ledger.epochs)
            found = [replicas[p % 2].slice(epoch, 0, p) for p in range(ledger.parts(0))]
            gradients = [each.gradients for each in found]
            copies = [[{k: g.clone() for k, g in each.items()} for each in gradients] for _ in "ab"]
            ledger.summed([loss for each in found for loss in each.losses], found[0].tokens)
            norms = [one.step(merge(each)) for one, each in zip(replicas, copies, strict=True)]
            assert norms[0] == norms[1]
            ledger.stepped(norms[0])
            assert replicas[0].digest() == replicas[1].digest()
            if evaluate():
                for replica in replicas:
                    replica.keep()
        tensors = replicas[1].take_best()
    alone = refined(directory, ends, 1, options)
    assert ledger.account().facts() == alone.facts()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in alone.tensors.items())


def test_one_slice_and_one_per_chunk_give_the_sum_over_the_chunks(checkpoint, compressed):
    """Both give the same bits; other numbers of slices agree to rounding."""
    directory, ends = compressed("llama"), dense_ends(checkpoint("llama"), 1, count=8)
    results = [
        refined(directory, ends, 1, replace(SHORT, batches=1, slices=slices))
        for slices in (1, 6, 99, 2)
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert results[0].epochs != results[3].epochs
    for one, other in zip(results[0].epochs, results[3].epochs, strict=True):
        assert one.gradient == pytest.approx(other.gradient, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_parameters_of_the_block_itself_are_trained(checkpoint, compressed, family):
    """Dense weights, a basis used by another block, and the support of sparse values do not
    change."""
    directory, dense = compressed(family), LazyModel.open(checkpoint(family))
    whole = [each.name for each in dense.survey().linears]
    lazy_model = LazyModel.open(directory)
    stayed = set(whole) - set(lazy_model._architecture.forms["modules"])
    firsts = [dense.survey().of_block(block)[0].name for block in range(4)]
    for block in range(2):
        ends = dense_ends(checkpoint(family), block)
        with lazy_model.shard(range(block, block + 1)) as shard:
            names = {*shard.parameters(), *lazy_model.block_names(block)}
            model = lazy_model._empty_model.model
            tensors = {**dict(model.named_parameters(remove_duplicate=False))}
            tensors |= dict(model.named_buffers())
            before = {name: tensors[name].detach().clone() for name in names}
            result = refine(shard, *ends, options=SHORT, randomness=Randomness(0))
            moved = {name for name in names if not torch.equal(before[name], tensors[name])}
        assert result.best > 0
        assert moved == set(result.tensors)
        own = {name for name in lazy_model.block_names(block) if tensors[name].is_floating_point()}
        assert own - moved == {f"{firsts[block]}.down.weight"} | {
            f"{name}.weight" for name in stayed if f"{name}.weight" in own
        }


def test_dense_weights_are_trained_on_request(checkpoint, compressed):
    """With `dense` all parameters of the block are trained except the shared basis."""
    directory = compressed("llama")
    with LazyModel.open(directory).shard(range(1, 2)) as shard:
        few = trained_parameters(shard, dense=False)
        every = trained_parameters(shard, dense=True)
        added = every.keys() - few.keys()
        assert added
        assert {type(shard.module(name.rpartition(".")[0])).__name__ for name in added} == {
            "Linear"
        }
        assert set(shard.own_parameters()) == set(every)
    result = refined(directory, dense_ends(checkpoint("llama"), 1), 1, replace(SHORT, dense=True))
    assert set(result.tensors) == set(every)


def test_blocks_that_share_a_basis_are_trained_together(checkpoint, compressed):
    """In a shard of both blocks the basis is trained, and remains one tensor."""
    lazy_model = LazyModel.open(compressed("llama"))
    dense = LazyModel.open(checkpoint("llama"))
    inputs = some_chunks(5)
    bases = [f"model.layers.{block}.self_attn.q_proj.down.weight" for block in range(2)]
    with lazy_model.shard(range(2)) as shard:
        start = shard.parameters()[bases[0]].detach().clone()
        result = refine(
            shard, inputs, passed(dense, range(2), inputs), options=SHORT, randomness=Randomness(0)
        )
    assert result.best > 0
    assert torch.equal(result.tensors[bases[0]], result.tensors[bases[1]])
    assert not torch.equal(result.tensors[bases[0]], start)


@pytest.mark.parametrize("form", ["sparse", "low_rank_sparse"])
def test_sparse_values_improve_on_their_support(checkpoint, tmp_path, form):
    """With all linears of one form the held-out loss decreases, and no entry is added."""

    def one_form(survey):
        rank = 3 if form == "low_rank_sparse" else 0
        return plan_of(
            survey,
            {
                each.name: Assignment(form=form, rank=rank, nonzeros=each.values // 3)
                for each in survey.linears
            },
        )

    made = compress(checkpoint("llama"), tmp_path / "out", make_plan=one_form)
    ends = dense_ends(checkpoint("llama"), 1)
    with LazyModel.open(made.directory).shard(range(1, 2)) as shard:
        module = shard.module("model.layers.1.mlp.up_proj")
        sparse = module if isinstance(module, SparseLinear) else module.sparse
        support = sparse.dense_weight() != 0
        result = refine(shard, *ends, options=SHORT, randomness=Randomness(0))
        assert torch.equal(sparse.dense_weight() != 0, support)
    assert result.best > 0


def test_values_at_padding_are_ignored(checkpoint, compressed, plain):
    """NaN in the targets outside the mask: the same bits."""
    directory, (inputs, targets) = compressed("llama"), dense_ends(checkpoint("llama"), 1)
    spoilt = [
        with_state(c, lambda t, mask=c.mask: t.where(mask[..., None], torch.nan)) for c in targets
    ]
    assert_same(refined(directory, (inputs, spoilt), 1), plain)


def test_a_diverging_training_returns_its_best_state(checkpoint, compressed):
    """An infinite target ends the training after one epoch, with the initial state."""
    directory, (inputs, targets) = compressed("llama"), dense_ends(checkpoint("llama"), 1)
    targets[0] = with_state(targets[0], lambda t: t * torch.inf)
    result = refined(directory, (inputs, targets), 1)
    assert (result.best, result.stop, len(result.epochs)) == (0, "diverged", 1)
    assert all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())


def test_chunks_in_16_bits_are_trained_on_in_float32(checkpoint, compressed):
    """The residual stream may be stored in bfloat16; parameters and sums are float32."""
    directory, (inputs, targets) = compressed("llama"), dense_ends(checkpoint("llama"), 1)
    halves = [
        [with_state(chunk, torch.Tensor.bfloat16) for chunk in ends] for ends in (inputs, targets)
    ]
    result = refined(directory, halves, 1)
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.float32}
    assert result.best > 0


@pytest.mark.parametrize(
    ("count", "part"), [(32, 0.125), (2, 0.5), (7, 0.01), (100, 0.5), (5, 0.3)]
)
def test_held_out_chunks_are_evenly_spaced(count, part):
    """Gaps between neighbours differ by at most one, and each chunk is in one of the two sets."""
    training, held_out = split(count, part)
    assert sorted(training + held_out) == list(range(count))
    assert len(held_out) == max(round(count * part), 1)
    gaps = {after - before for before, after in pairwise(held_out)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert split(32, 0.125)[1] == [4, 12, 20, 28]


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    """200 steps give a twentieth of the rate first, all at step 20, a tenth at the end."""
    options = RefineOptions(learning_rate=1.0)
    rates = [rate(step, 200, options) for step in range(201)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20:] == pytest.approx(
        [0.1 + 0.45 * (1 + cos(pi * turn / 180)) for turn in range(181)]
    )
    assert rates[110] == pytest.approx(0.55)
    assert rate(0, 1, options) == 1.0


def test_mismatched_arguments_are_refused(checkpoint, compressed):
    """Mismatched chunks, too few chunks, 16 bits, and options out of range."""
    directory, (inputs, targets) = compressed("llama"), dense_ends(checkpoint("llama"), 1)
    for ends, message in [
        ((inputs, targets[1:]), "5 input chunks, but 4 target chunks"),
        ((inputs, targets[::-1]), "are different chunks"),
        ((inputs[:1], targets[:1]), "1 chunks; at least one to train on and one to hold"),
    ]:
        with pytest.raises(ValueError, match=message):
            refined(directory, ends, 1, replace(SHORT, held_out=0.4))
    with pytest.raises(ValueError, match=r"has torch\.bfloat16; float32 is needed"):
        refined(directory, (inputs, targets), 1, dtype=torch.bfloat16)
    for option, value in [("epochs", 0), ("clip", 0), ("held_out", 0.6), ("dense", "yes")]:
        with pytest.raises(UsageError, match=f"refinement: {option} is {value!r}"):
            RefineOptions(**{option: value})
