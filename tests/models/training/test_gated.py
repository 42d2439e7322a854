"""Gates of directions: outputs, gradients beside autograd's through the weights, and memory."""

import pytest
import torch
from compressed import some_chunks
from sharded import whole_model
from torch.nn.functional import cross_entropy, linear

from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.orientation import as_dense, dense_weight
from orchestrator.models.training.gated import GatedLowRankLinear, product, scaled

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"]
CUTS = ([range(4)], [range(2), range(2, 4)])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def factors(weight_OI, directions=None):
    """Left singular vectors [O, R], and their products with the weight [R, I]."""
    left_OR = torch.linalg.svd(weight_OI, full_matrices=False)[0][:, :directions]
    return left_OR, left_OR.T @ weight_OI


def gated(weight_OI, directions, *, tail, bias_O=None, dtype=torch.float64):
    """The gated linear of a weight, with singular vectors on the left."""
    left_OR, right_RI = factors(weight_OI, directions)
    dense = weight_OI.to(dtype) if tail else None
    return GatedLowRankLinear(left_OR.to(dtype), right_RI.to(dtype), dense, bias_O)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_open_gates_give_the_dense_output(dtype):
    """To the bit with a tail; to rounding if the directions are the whole weight."""
    weight_OI, input = normal(7, 10, dtype=dtype), normal(3, 5, 10, seed=1, dtype=dtype)
    left, right = (each.to(dtype) for each in factors(weight_OI.double(), 4))
    with_tail = GatedLowRankLinear(left, right, weight_OI, normal(7, seed=2, dtype=dtype))
    expected = linear(input, weight_OI) + with_tail.bias_O
    assert torch.equal(with_tail(input), expected)
    whole = gated(weight_OI.double(), None, tail=False, dtype=dtype)
    error = (whole(input) - linear(input, weight_OI)).detach().abs()
    assert float(error.max()) < 16 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_outputs_are_those_of_the_formula():
    """For any gates: U (s z) + s_tail (W x - U z) + bias, in float64."""
    weight_OI, input, bias_O = normal(6, 9), normal(5, 9, seed=1), normal(6, seed=2)
    module = gated(weight_OI, 3, tail=True, bias_O=bias_O)
    module.gates_R.data.copy_(torch.tensor([0.5, 0.0, 1.75]))
    module.tail.data.fill_(0.25)
    left_OR, right_RI = factors(weight_OI, 3)
    cut_OI = left_OR @ torch.diag(module.gates_R.detach().double()) @ right_RI
    expected = cut_OI + 0.25 * (weight_OI - left_OR @ right_RI)
    torch.testing.assert_close(module(input), linear(input, expected, bias_O))


@pytest.mark.parametrize("tail", [False, True])
def test_gradients_are_those_of_finite_differences(tail):
    """Gradients of inputs, gates and tail in float64, at gates that are neither 0 nor 1."""
    module = gated(normal(6, 9), 3, tail=tail).double()
    module.gates_R.data.copy_(torch.tensor([0.5, -0.25, 1.75]))
    if tail:
        module.tail.data.fill_(0.75)
    names = [name for name, _ in module.named_parameters()]

    def output(input, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, given, (input,))

    values = [each.detach().clone().requires_grad_() for each in module.parameters()]
    assert torch.autograd.gradcheck(output, (normal(2, 4, 9, seed=1).requires_grad_(), *values))


def whole_gradients(model, chunks):
    """Backward passes of the mean cross-entropy of each chunk's next tokens."""
    for chunk in chunks:
        found = model(input_ids=chunk.tokens, attention_mask=chunk.mask.long()).logits
        both_BT = chunk.mask[:, :-1] & chunk.mask[:, 1:]
        cross_entropy(found[:, :-1][both_BT], chunk.tokens[:, 1:][both_BT]).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_gradients_are_those_of_weights_along_directions(family, checkpoint):
    """h_i = u_i^T G D_i^T to 1e-5 of the largest, the tail's is the rest of <G, W>, and over all
    directions of a linear the sum is <G, W>; with every linear of the model gated at once."""
    directory, chunks = checkpoint(family), some_chunks(2)
    names = [each.name for each in LazyModel.open(directory).survey().linears]
    model = whole_model(directory, torch.float64)
    whole_gradients(model, chunks)
    weights, slopes, modules = {}, {}, {}
    for turn, name in enumerate(names):
        module = model.get_submodule(name)
        weights[name], slopes[name] = dense_weight(module), as_dense(module, module.weight.grad)
        has_tail = turn % 2 == 0
        modules[name] = gated(weights[name], 5 if has_tail else None, tail=has_tail)
        modules[name].bias_O = module.bias
    model.requires_grad_(False)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    whole_gradients(model, chunks)
    for name, module in modules.items():
        along_R = ((module.left_OR.T @ slopes[name]) * module.right_RI).sum(dim=1)
        found_R = module.gates_R.grad.double()
        largest = float(along_R.abs().max())
        torch.testing.assert_close(found_R, along_R, rtol=1e-5, atol=1e-5 * largest)
        whole = (slopes[name] * weights[name]).sum()
        tail = 0.0 if module.tail is None else module.tail.grad.double().squeeze()
        torch.testing.assert_close(found_R.sum() + tail, whole, rtol=1e-5, atol=1e-5 * largest)


def run_noting_saved(module, input):
    """The tensors that a forward pass keeps, and its output."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = module(input)
    return saved, output


def test_a_backward_pass_keeps_inner_values_and_no_weight_gradient():
    """Kept besides parameters are z [T, R], and with a tail x [T, I]; parameters keep no gradient
    but the gates', and no tensor of the size of a factor is made."""
    tokens, inputs, outputs, rank = 4, 64, 80, 8
    module = gated(normal(outputs, inputs), rank, tail=True, dtype=torch.float32)
    input = normal(tokens, inputs, seed=1, dtype=torch.float32).requires_grad_()
    own = {each.data_ptr() for each in (*module.buffers(), *module.parameters())}
    for tail, kept in ((module.tail, {(tokens, rank), (tokens, inputs)}), (None, {(tokens, rank)})):
        module.tail = tail
        saved, output = run_noting_saved(module, input)
        extra = [each for each in saved if each.data_ptr() not in own and each.shape != (rank,)]
        assert {tuple(each.shape) for each in extra} == kept
        with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
            output.sum().backward()
        sizes = [each.self_cpu_memory_usage for each in profile.events()]
        assert max(sizes) <= 4 * tokens * outputs < 4 * rank * inputs
    assert not any(each.requires_grad for each in module.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_16_bits_have_gates_in_float32(dtype):
    """Gates are float32 whatever stores the factors; their gradient is that of the rounded factors
    to the rounding of z and U^T g."""
    weight_OI, input = normal(24, 16), normal(200, 16, seed=1)
    slope = normal(200, 24, seed=2)
    half = gated(weight_OI, 4, tail=True, dtype=dtype)
    double = GatedLowRankLinear(*(each.double() for each in half.buffers()))
    assert half.gates_R.dtype == half.tail.dtype == torch.float32
    mixed = GatedLowRankLinear(*half.buffers())
    for module, given in ((half, input.to(dtype)), (mixed, input.float()), (double, input)):
        output = module(given)
        assert output.dtype == given.dtype
        output.backward(slope.to(given.dtype))
    scale = float(double.gates_R.grad.abs().max())
    for module, tolerance in ((half, 4 * torch.finfo(dtype).eps), (mixed, 1e-6)):
        for found, exact in zip(module.parameters(), double.parameters(), strict=True):
            assert found.grad.dtype == torch.float32
            assert float((found.grad - exact.grad).abs().max()) < tolerance * scale


def test_inputs_without_a_gradient_still_give_the_gates_theirs():
    """The first linear of a model has such inputs; h and the tail's gradient do not change."""
    module = gated(normal(6, 9), 3, tail=True)
    grads = []
    for wanted in (True, False):
        module.zero_grad()
        module(normal(5, 9, seed=1).requires_grad_(wanted)).square().sum().backward()
        grads.append((module.gates_R.grad.clone(), module.tail.grad.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    values = normal(5, 3).requires_grad_()
    product(scaled(values, torch.ones(3)), normal(4, 3)).sum().backward()
    assert values.grad is not None


def test_the_cut_of_a_model_changes_no_bit(checkpoint):
    """Gates of a shard's linears have the same gradients in one shard and in two; a closed shard
    runs its linears as they are."""
    directory, (chunk,) = checkpoint("llama"), some_chunks(1)
    found = []
    for cut in CUTS:
        entered, gradients = [], {}
        state = chunk
        for part in cut:
            shard = LazyModel.open(directory, dtype=torch.float32).shard(part)
            shard.freeze()
            modules = {}
            for each in shard.linears:
                module = shard.module(each.name)
                modules[each.name] = gated(dense_weight(module), 5, tail=True, dtype=torch.float32)
                shard.run_as(module, modules[each.name].__call__)
            entered.append((shard, modules, state))
            state = state if shard.is_last else shard.forward(state)
        grads = torch.ones_like
        for shard, modules, state in entered[::-1]:
            grads = shard.backward(state, grads)
            gradients |= {name: module.gates_R.grad for name, module in modules.items()}
            first = shard.module(shard.linears[0].name)
            shard.close()
            assert "forward" not in vars(first)
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
        assert bool(gradient.any())
