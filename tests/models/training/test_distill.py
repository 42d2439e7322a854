"""Distillation losses and their gradients, against their definitions."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from orchestrator.models.training.distill import LossWeights, TopK, distill

VOCABULARY = 40
ONE = LossWeights(divergence=1.0, cross_entropy=0.0)


def some_logits(seed, dtype=torch.float32):
    """Logits of three sequences of 300 tokens, more than a slice."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(3, 300, VOCABULARY, generator=generator)).to(dtype)


def some_tokens():
    generator = torch.Generator().manual_seed(9)
    tokens_BT = torch.randint(0, VOCABULARY, (3, 300), generator=generator)
    mask_BT = torch.ones(3, 300, dtype=torch.bool)
    mask_BT[1, 290:] = False
    mask_BT[2] = False
    return tokens_BT, mask_BT


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["logits", "all outcomes"])
def test_the_divergence_is_that_of_torch(kind, temperature):
    """With full logits, or all outcomes stored, it is τ² KL of the softened distributions."""
    ours, theirs = some_logits(1), some_logits(2)
    targets = theirs if kind == "logits" else TopK.of(theirs, VOCABULARY, temperature)
    tokens_BT, mask_BT = some_tokens()
    losses, grad_BTV = distill(
        ours, tokens_BT, mask_BT, targets, temperature=temperature, weights=ONE
    )
    leaf = ours.double().requires_grad_()
    q_BTV, p_BTV = (log_softmax(x.double() / temperature, dim=-1) for x in (leaf, theirs))
    kl_BTV = kl_div(q_BTV, p_BTV, reduction="none", log_target=True)
    expected = temperature**2 * kl_BTV[mask_BT].sum()
    expected.backward()
    assert losses.divergence == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad_BTV.double(), leaf.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("most", [1, 7])
def test_the_rest_counts_as_one_outcome(most, temperature):
    """KL over the stored outcomes and their complement; the gradient equals autograd's."""
    ours, theirs = some_logits(1), some_logits(2)
    tokens_BT, mask_BT = some_tokens()
    targets = TopK.of(theirs, most, temperature)
    losses, grad_BTV = distill(
        ours, tokens_BT, mask_BT, targets, temperature=temperature, weights=ONE
    )
    leaf = ours.double().requires_grad_()
    q_BTV, p_BTV = (torch.softmax(x.double() / temperature, dim=-1) for x in (leaf, theirs))
    index_BTK = p_BTV.topk(most, dim=-1).indices
    outcomes = []
    for probabilities in (p_BTV, q_BTV):
        kept = probabilities.gather(2, index_BTK)
        outcomes.append(torch.cat([kept, 1 - kept.sum(dim=-1, keepdim=True)], dim=-1))
    p_BTK, q_BTK = outcomes
    kl_BT = (p_BTK * (p_BTK.log() - q_BTK.log())).sum(dim=-1)
    expected = temperature**2 * kl_BT[mask_BT].sum()
    expected.backward()
    assert losses.divergence == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad_BTV.double(), leaf.grad, rtol=0, atol=5e-6)
    full, _ = distill(ours, tokens_BT, mask_BT, theirs, temperature=temperature)
    assert losses.divergence < full.divergence


def test_stored_probabilities_and_rest_sum_to_one():
    """The stored probabilities and the rest sum to one, and the largest are stored."""
    targets = TopK.of(some_logits(3), 5, 1.0)
    mass_BT = targets.log_p_BTK.exp().sum(dim=-1) + targets.log_rest_BT.exp()
    torch.testing.assert_close(mass_BT, torch.ones(3, 300))
    assert torch.equal(targets.index_BTK[..., 0], some_logits(3).argmax(dim=-1).int())
    stored = TopK.from_tensors(targets.tensors())
    assert torch.equal(stored.log_p_BTK, targets.log_p_BTK)
    assert stored.index_BTK.dtype == torch.int32


def test_the_cross_entropy_is_that_of_the_next_tokens():
    """Only real tokens that follow real ones are predicted; weights scale the gradient."""
    ours, (tokens_BT, mask_BT) = some_logits(1), some_tokens()
    weights = LossWeights(divergence=0.0, cross_entropy=0.25)
    losses, grad_BTV = distill(
        ours, tokens_BT, mask_BT, some_logits(2), temperature=1.0, weights=weights
    )
    leaf = ours.double().requires_grad_()
    both_BT = mask_BT[:, :-1] & mask_BT[:, 1:]
    expected = cross_entropy(leaf[:, :-1][both_BT], tokens_BT[:, 1:][both_BT], reduction="sum")
    (0.25 * expected).backward()
    assert losses.cross_entropy == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad_BTV.double(), leaf.grad, rtol=0, atol=1e-6)


def test_the_divergence_of_a_model_from_itself_is_zero():
    """KL and its gradient vanish if both models agree, for any number of stored outcomes."""
    ours, (tokens_BT, mask_BT) = some_logits(1), some_tokens()
    for targets in (ours, TopK.of(ours, 3, 2.0)):
        losses, grad_BTV = distill(ours, tokens_BT, mask_BT, targets, temperature=2.0, weights=ONE)
        assert abs(losses.divergence) < 1e-3
        assert float(grad_BTV.abs().max()) < 1e-6


def test_sixteen_bits_are_widened_and_padding_gets_no_gradient():
    """The gradient has the logits' dtype and is zero outside the mask."""
    tokens_BT, mask_BT = some_tokens()
    weights = LossWeights(divergence=1.0, cross_entropy=1.0)
    logits = some_logits(1, torch.bfloat16)
    _, grad_BTV = distill(
        logits, tokens_BT, mask_BT, some_logits(2), temperature=1.0, weights=weights
    )
    _, exact_BTV = distill(
        logits.float(), tokens_BT, mask_BT, some_logits(2), temperature=1.0, weights=weights
    )
    assert grad_BTV.dtype == torch.bfloat16
    assert torch.equal(grad_BTV, exact_BTV.bfloat16())
    assert not grad_BTV[~mask_BT].any()
