"""Gradients by weights and by singular directions, against autograd and finite differences."""

import pytest
import torch
from matrices import gaussian
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from orchestrator.errors import InputError
from orchestrator.linalg.gradients import DirectionGradients, WeightGradient
from orchestrator.methods import METHODS
from orchestrator.models.evaluation.scoring import text_label_gradient
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import dense_weight

TOKENS = torch.arange(90).view(3, 30) * 7 % 96
MASK = torch.ones(3, 30, dtype=torch.bool)
MASK[1, 25:] = False


def gather(model, kind, order=(0, 1, 2)):
    """Statistics of all linears in float64, by name; the loss is of the text's next tokens."""
    lazy_model = LazyModel.open(model, dtype=torch.float64)
    with lazy_model.shard(range(lazy_model.num_blocks)) as shard:
        shard.freeze()
        calibration = Calibration(shard, shard.linears, METHODS["svd"].side, gradient=kind)
        for row in order:
            tokens, mask = TOKENS[row : row + 1], MASK[row : row + 1]

            def grads(logits, tokens=tokens, mask=mask):
                return text_label_gradient(logits, tokens, mask)

            calibration.backward(Chunk(row, tokens, mask), grads)
        calibration.flush_writes()
        found = {each.name: calibration.statistic(each).gradient for each in shard.linears}
        calibration.close()
        for linear in shard.linears:
            module = shard.module(linear.name)
            assert not module._forward_hooks
            assert module.weight.grad is None
    return found


def loss_of(model, row):
    """Loss of a sequence by the whole model: the sum over real tokens that follow real ones."""
    logits = model(input_ids=TOKENS[row : row + 1], attention_mask=MASK[row : row + 1].long())
    kept = MASK[row, 1:]
    return cross_entropy(logits.logits[0, :-1][kept], TOKENS[row, 1:][kept], reduction="sum")


def whole_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_they_are_those_of_autograd(family, checkpoint):
    """G is the gradient of the whole model's loss by each weight; h_i = u_iᵀ G Wᵀ u_i of every
    sequence, with Σ h and Σ h² over sequences, and Σ_i h_i = <G, W>."""
    weights, directions = (gather(checkpoint(family), kind) for kind in ("weight", "directions"))
    whole = whole_model(checkpoint(family))
    modules = {name: whole.get_submodule(name) for name in weights}
    parameters = [module.weight for module in modules.values()]
    grads = [torch.autograd.grad(loss_of(whole, row), parameters) for row in range(3)]
    for (name, module), *each in zip(modules.items(), *grads, strict=True):
        weight_OI = dense_weight(module)
        by_sequence = [_oriented(module, grad) for grad in each]
        total = sum(by_sequence)
        assert isinstance(weights[name], WeightGradient)
        torch.testing.assert_close(weights[name].matrix_OI, total, **near(total))
        u_OK = torch.linalg.svd(weight_OI, full_matrices=False)[0]
        h = [torch.sum(u_OK * (grad @ weight_OI.T @ u_OK), dim=0) for grad in by_sequence]
        found = directions[name]
        assert found.sequences == 3
        torch.testing.assert_close(found.sum_K, sum(h), **near(sum(map(torch.abs, h))))
        squares = sum(each.square() for each in h)
        torch.testing.assert_close(found.square_K, squares, **near(squares))
        assert float(found.sum_K.sum()) == pytest.approx(float(torch.sum(total * weight_OI)))


def near(expected):
    """Tolerance of norms in float32, which most families have in any dtype."""
    return {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}


def _oriented(module, grad):
    """Gradient of a module's weight as [O, I]."""
    return grad.T if type(module).__name__ == "Conv1D" else grad


def test_they_are_finite_differences_of_the_loss(checkpoint):
    """(L(s_i = 1 + ε) − L(s_i = 1 − ε)) / 2ε is h_i of the sum over sequences, in a GPT-2, whose
    own forward is in float64 throughout."""
    found = gather(checkpoint("gpt2"), "directions")
    whole, step = whole_model(checkpoint("gpt2")), 1e-4
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.3.mlp.c_proj"):
        weight_OI = dense_weight(whole.get_submodule(name))
        before_OI = weight_OI.clone()
        u_OK = torch.linalg.svd(before_OI, full_matrices=False)[0]
        for direction in (0, 3, u_OK.shape[1] - 1):
            part_OI = torch.outer(u_OK[:, direction], u_OK[:, direction] @ before_OI)
            losses = []
            with torch.no_grad():
                for sign in (1, -1):
                    weight_OI.copy_(before_OI + sign * step * part_OI)
                    losses.append(sum(float(loss_of(whole, row)) for row in range(3)))
                weight_OI.copy_(before_OI)
            slope = (losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx(float(found[name].sum_K[direction]), rel=1e-5)


def test_the_order_of_sequences_changes_rounding_alone(checkpoint):
    """Σ h and Σ h² of any order agree to 1e-12."""
    found, turned = (
        gather(checkpoint("llama"), "directions", order) for order in ((0, 1, 2), (2, 0, 1))
    )
    for name, each in found.items():
        scale = float(each.square_K.max())
        torch.testing.assert_close(
            turned[name].square_K, each.square_K, rtol=1e-12, atol=1e-12 * scale
        )
        assert not torch.equal(each.square_K, each.sum_K.square())


@pytest.mark.parametrize("experts", ["qwen3_moe", "gpt_oss"])
def test_experts_have_those_of_their_rows(experts, moe_checkpoint):
    """Σ_i h_i = <G, W> for every expert, whose rows come in an order of their own; their G adds up
    to a gradient that is not zero."""
    weights, directions = (
        gather(moe_checkpoint(experts), kind) for kind in ("weight", "directions")
    )
    lazy_model = LazyModel.open(moe_checkpoint(experts), dtype=torch.float64)
    with lazy_model.shard(range(lazy_model.num_blocks)) as shard:
        seen = 0
        for linear in shard.linears:
            weight_OI, gradient = dense_weight(shard.module(linear.name)), weights[linear.name]
            inner = float(torch.sum(gradient.matrix_OI * weight_OI))
            total = float(directions[linear.name].sum_K.sum())
            assert total == pytest.approx(inner, rel=1e-8, abs=1e-12)
            seen += bool(linear.experts) and inner != 0
        assert seen > 4


@pytest.mark.parametrize("ahead", [1, 2])
def test_labels_of_the_text_have_the_gradient_of_cross_entropy(ahead):
    """It is autograd's, for the next token and the one after it, without labels in the padding."""
    logits = gaussian(3 * 30, 96, seed=3).view(3, 30, 96).requires_grad_()
    losses = [
        cross_entropy(logits[row, :-ahead][kept], TOKENS[row, ahead:][kept], reduction="sum")
        for row, kept in enumerate(MASK[:, ahead:])
    ]
    sum(losses).backward()
    found = text_label_gradient(logits.detach(), TOKENS, MASK, ahead=ahead)
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("outputs", "inputs"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("kind", [WeightGradient, DirectionGradients])
def test_a_loss_at_its_minimum_has_none(kind, outputs, inputs):
    """½ |Y − W X|² with Y = W X has zero gradients, which are refused with the linear's name; of
    Y = 0 it has h_i = |u_iᵀ W X|² > 0."""
    weight_OI, inputs_TI = gaussian(outputs, inputs, seed=1), gaussian(20, inputs, seed=2)
    still, moved = kind(weight_OI), kind(weight_OI)
    still.update(still.images(inputs_TI), torch.zeros(20, outputs, dtype=torch.float64))
    with pytest.raises(InputError, match=r"block\.q.*zero, the loss does not depend on it"):
        still.check("block.q")
    with pytest.raises(InputError, match="no token has reached it"):
        kind(weight_OI).check("block.q")
    outputs_TO = inputs_TI @ weight_OI.T
    moved.update(moved.images(inputs_TI), outputs_TO)
    moved.check("block.q")
    if kind is DirectionGradients:
        u_OK = torch.linalg.svd(weight_OI, full_matrices=False)[0]
        torch.testing.assert_close(moved.sum_K, (outputs_TO @ u_OK).square().sum(dim=0))
    broken = kind(weight_OI)
    broken.update(broken.images(inputs_TI), outputs_TO * float("nan"))
    with pytest.raises(InputError, match=r"block\.q: its gradient has .* non-finite"):
        broken.check("block.q")
