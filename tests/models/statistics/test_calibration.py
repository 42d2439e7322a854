"""Statistics of a shard: Grams of the real tokens on the requested side."""

import itertools
import weakref

import pytest
import torch
from pipeline import write_llama
from transformers import AutoModelForCausalLM

from orchestrator.linalg.low_rank import InputGram, OutputGram
from orchestrator.methods import METHODS
from orchestrator.models.evaluation.scoring import draw_label_gradient
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import dense_weight

TOKENS = torch.arange(40).view(2, 20) * 7 % 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("calibration") / "dense", blocks=2)


def gather(model, mask, side, **options):
    lazy_model = LazyModel.open(model)
    with lazy_model.shard(range(2)) as shard:
        calibration = Calibration(shard, shard.linears, side, **options)
        for row in range(2):
            calibration.forward(Chunk(row, TOKENS[row : row + 1], mask[row : row + 1]))
        found = {linear.name: calibration.statistic(linear) for linear in shard.linears}
        calibration.close()
        modules = [shard.module(linear.name) for linear in shard.linears]
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    return found


@pytest.mark.parametrize("padding", [0, 5])
def test_grams_are_of_the_real_tokens(model, padding):
    """H is the sum of x xᵀ over the whole model's inputs of the linear, without padding."""
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[:, 20 - padding :] = False
    found = gather(model, mask, lambda linear, site: "input")
    whole = AutoModelForCausalLM.from_pretrained(model)
    for name, statistic in found.items():
        seen = []
        hook = whole.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0])
        )
        with torch.no_grad():
            for row in range(2):
                whole(input_ids=TOKENS[row : row + 1])
        hook.remove()
        rows = torch.cat(seen)[mask].double()
        assert statistic.tokens == int(mask.sum())
        torch.testing.assert_close(statistic.matrix_II, rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 5])
def test_magnitudes_are_of_the_real_tokens(model, padding):
    """The mean of |x| over the whole model's inputs of each linear, for either Gram."""
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[:, 20 - padding :] = False
    found = gather(model, mask, METHODS["asvd"].side, magnitudes=True)
    assert {type(statistic) for statistic in found.values()} == {InputGram, OutputGram}
    whole = AutoModelForCausalLM.from_pretrained(model)
    for name, statistic in found.items():
        seen = []
        hook = whole.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0])
        )
        with torch.no_grad():
            for row in range(2):
                whole(input_ids=TOKENS[row : row + 1])
        hook.remove()
        rows = torch.cat(seen)[mask].double()
        torch.testing.assert_close(statistic.magnitude_I, rows.abs().mean(dim=0), rtol=1e-5, atol=0)


def test_magnitudes_are_accumulated_only_on_request(model):
    """Other methods do not accumulate magnitudes."""
    found = gather(model, torch.ones_like(TOKENS, dtype=torch.bool), METHODS["svd"].side)
    assert {statistic.magnitude_I for statistic in found.values()} == {None}


def test_linears_of_a_site_share_one_gram(model):
    """q, k and v read one input, gate and up another; each site has a single Gram."""
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    found = gather(model, mask, lambda linear, site: "input")
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        for one, other in [("q", "k"), ("q", "v")]:
            assert torch.equal(
                found[f"{attention}.{one}_proj"].matrix_II,
                found[f"{attention}.{other}_proj"].matrix_II,
            )
        assert torch.equal(found[f"{mlp}.gate_proj"].matrix_II, found[f"{mlp}.up_proj"].matrix_II)


def test_an_output_gram_is_the_weight_around_the_input_gram(model):
    """W H Wᵀ accumulated from outputs equals the product computed from H."""
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    inputs = gather(model, mask, lambda linear, site: "input")
    outputs = gather(model, mask, lambda linear, site: "output")
    whole = AutoModelForCausalLM.from_pretrained(model)
    for name, statistic in outputs.items():
        weight = whole.get_submodule(name).weight.detach().double()
        expected = weight @ inputs[name].matrix_II @ weight.T
        torch.testing.assert_close(statistic.matrix_OO, expected, rtol=1e-4, atol=1e-4)


def test_svd_llm_requests_the_smaller_gram(model):
    """Only down_proj, alone at its site and with fewer outputs than inputs, gets the output
    Gram."""
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    for name, statistic in gather(model, mask, METHODS["svd-llm"].side).items():
        kind = OutputGram if name.endswith("down_proj") else InputGram
        assert isinstance(statistic, kind)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "falcon"])
def test_cosines_compare_the_stream_before_and_after_each_sublayer(family, checkpoint):
    """Sequential sublayers each have their own cosine; parallel ones share that of the block. A
    block has its own pair, also the last one of the shard, of which the shard alone tells."""
    tokens = torch.arange(30)[None] * 7 % 96
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 25:] = False
    lazy_model = LazyModel.open(checkpoint(family))
    with lazy_model.shard(range(lazy_model.num_blocks)) as shard:
        calibration = Calibration(shard, shard.linears, METHODS["svd-llm"].side, block_cosines=True)
        passed = calibration.forward(Chunk(0, tokens, mask)).payload.tensors()[0]
        found = [calibration.cosines(block) for block in range(4)]
        calibration.close()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    with torch.no_grad():
        states = whole(input_ids=tokens, output_hidden_states=True).hidden_states
    # the whole model's last state is behind its final norm
    states = (*states[:4], passed)
    for block in range(4):
        own = found[block].pop(f"{block}")
        cosines = list(found[block].values())
        assert {cosine.tokens for cosine in cosines} == {25}
        assert len(cosines) == 2
        before, after = (state[0, :25].double() for state in states[block : block + 2])
        whole_block = torch.cosine_similarity(before, after, dim=-1).mean().item()
        assert own.mean == pytest.approx(whole_block, rel=1e-5)
        assert own.tokens == 25
        if family in ("gpt_neox", "falcon"):
            assert [c.mean for c in cosines] == pytest.approx([whole_block] * 2, rel=1e-5)
        else:
            assert all(-1 <= cosine.mean <= 1 for cosine in cosines)
            assert cosines[0].mean != pytest.approx(cosines[1].mean, rel=1e-4)


def test_the_stream_between_sublayers_is_that_of_the_model(model):
    """In a Llama the stream after attention is its input plus the attention's output."""
    tokens = TOKENS[:1]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    lazy_model = LazyModel.open(model)
    with lazy_model.shard(range(2)) as shard:
        calibration = Calibration(shard, shard.linears, METHODS["svd-llm"].side, block_cosines=True)
        calibration.forward(Chunk(0, tokens, mask))
        found = calibration.cosines(1)
    whole = AutoModelForCausalLM.from_pretrained(model)
    seen = {}
    layer = whole.model.layers[1]
    layer.register_forward_pre_hook(lambda m, inputs: seen.update(before=inputs[0]))
    layer.self_attn.register_forward_hook(lambda m, i, output: seen.update(attention=output[0]))
    layer.register_forward_hook(lambda m, i, output: seen.update(after=output))
    with torch.no_grad():
        whole(input_ids=tokens)
    between = seen["before"] + seen["attention"]
    expected = {
        "1.self_attn": torch.cosine_similarity(seen["before"], between, dim=-1).mean().item(),
        "1.mlp": torch.cosine_similarity(between, seen["after"], dim=-1).mean().item(),
        "1": torch.cosine_similarity(seen["before"], seen["after"], dim=-1).mean().item(),
    }
    assert {name: cosine.mean for name, cosine in found.items()} == pytest.approx(expected)


def label_gradient(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: draw_label_gradient(logits, mask, generator)


@pytest.mark.parametrize("cut", [(2,), (1, 2)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "qwen3"])
def test_curvature_is_the_second_moment_of_the_gradients_of_the_loss(family, cut, checkpoint):
    """It is sum g gᵀ per linear over real tokens, or Wᵀ around it, equal to autograd of the whole
    model. The shard boundaries do not change it."""
    tokens = torch.arange(30)[None] * 7 % 96
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 25:] = False
    lazy_model = LazyModel.open(checkpoint(family))
    starts = (0, *(lazy_model.num_blocks * part // cut[-1] for part in cut))
    chunks, found = [Chunk(0, tokens, mask)], {}
    for start, stop in itertools.pairwise(starts[:-1]):
        with lazy_model.shard(range(start, stop)) as shard:
            chunks.append(shard.forward(chunks[-1]))
    gradient = label_gradient(mask, 5)
    for (start, stop), chunk in zip(
        reversed([*itertools.pairwise(starts)]), reversed(chunks), strict=True
    ):
        with lazy_model.shard(range(start, stop)) as shard:
            shard.freeze()
            calibration = Calibration(
                shard, shard.linears, METHODS["two-sided"].side, curvature=True
            )
            gradient = calibration.backward(chunk, gradient)
            found |= {each.name: (each, calibration.statistic(each)) for each in shard.linears}
            calibration.close()
            assert all(parameter.grad is None for parameter in shard.parameters().values())
    whole = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    outputs = {}
    for name in found:
        if name in dict(whole.named_modules()):
            whole.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: outputs.update({name: output})
            )
    logits = whole(input_ids=tokens, attention_mask=mask.long()).logits
    names = [name for name in outputs]
    grads = torch.autograd.grad(
        logits, [outputs[name] for name in names], label_gradient(mask, 5)(logits.detach())
    )
    assert names
    for name, grad in zip(names, grads, strict=True):
        linear, statistic = found[name]
        rows = grad.reshape(-1, linear.out_features)[mask[0]].double()
        if linear.out_features > linear.in_features:
            weight = dense_weight(whole.get_submodule(name)).double()
            rows = rows @ weight
        expected = rows.T @ rows
        assert statistic.curvature.gradients == statistic.tokens == 25
        torch.testing.assert_close(
            statistic.curvature.matrix_KK, expected, rtol=1e-3, atol=1e-4 * float(expected.max())
        )


def test_drawn_gradients_have_the_fisher_information():
    """Their mean is zero and their second moment diag(p) − p pᵀ; they are zero outside the mask."""
    logits = torch.randn(1, 6000, 5, generator=torch.Generator().manual_seed(0))
    logits[:] = logits[:, :1]
    mask = torch.ones(1, 6000, dtype=torch.bool)
    mask[:, 4000:] = False
    found = draw_label_gradient(logits, mask, torch.Generator().manual_seed(1))[0].double()
    assert not found[4000:].any()
    p = torch.softmax(logits[0, 0].double(), 0)
    second = found[:4000].T @ found[:4000] / 4000
    torch.testing.assert_close(second, p.diag() - p.outer(p), rtol=0, atol=0.02)
    torch.testing.assert_close(found[:4000].mean(0), torch.zeros(5).double(), rtol=0, atol=0.03)


def test_a_finished_calibration_ignores_chunks_and_frees_forgotten_grams(model):
    """Statistics keep their bits, later chunks are ignored, a Gram is freed with its last
    linear."""
    mask = torch.ones(1, 20, dtype=torch.bool)
    first, second = (Chunk(row, TOKENS[row : row + 1], mask) for row in range(2))
    lazy_model = LazyModel.open(model)
    with lazy_model.shard(range(2)) as shard:
        calibration = Calibration(shard, shard.linears, lambda linear, site: "input")
        calibration.forward(first)
        before = {each.name: calibration.statistic(each).matrix_II for each in shard.linears}
        passed = calibration.forward(second).payload.tensors()[0]
        calibration = Calibration(shard, shard.linears, lambda linear, site: "input")
        calibration.forward(first)
        calibration.flush_writes()
        again = calibration.forward(second).payload.tensors()[0]
        assert torch.equal(passed, again)
        for linear in shard.linears:
            assert torch.equal(calibration.statistic(linear).matrix_II, before[linear.name])
        grams = {name: weakref.ref(gram) for name, gram in calibration._grams.items()}
        left = list(shard.linears)
        while left:
            calibration.forget([left.pop(0)])
            alive = {name for name, gram in grams.items() if gram() is not None}
            assert alive == {each.site for each in left}


def test_freed_ends_are_reloaded_by_the_next_pass(model):
    """Embeddings and head are freed, blocks are kept; the next pass gives the same bits."""
    mask = torch.ones(1, 20, dtype=torch.bool)
    chunk, lazy_model = Chunk(0, TOKENS[:1], mask), LazyModel.open(model)
    with lazy_model.shard(range(2)) as shard:
        shard.freeze()
        before = shard.logits(chunk)
        ends = [n for n in shard.parameters() if not n.startswith("model.layers")]
        whole = {name: weakref.ref(shard.parameters()[name]) for name in ends}
        assert any("embed" in name for name in ends)
        for _ in range(2):
            shard.free_ends()
        assert not any(each() is not None for each in whole.values())
        assert all(name.startswith("model.layers") for name in shard.parameters())
        assert torch.equal(shard.logits(chunk), before)
        assert not any(each.requires_grad for each in shard.parameters().values())
    assert lazy_model.shard(range(1)).forward(chunk).payload is not None
