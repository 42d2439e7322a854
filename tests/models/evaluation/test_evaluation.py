"""Scores of a text, against closed forms and torch's losses."""

import math

import pytest
import torch
from pretend import pretended_device
from torch.nn.functional import cross_entropy, kl_div

from orchestrator.models.evaluation.scoring import Score, _draw, score


def random_case(seed=0, rows=2, length=7, vocabulary=11):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, length), generator=rng)
    logits = torch.randn(rows, length, vocabulary, generator=rng)
    against = torch.randn(rows, length, vocabulary, generator=rng)
    return tokens, torch.ones(rows, length, dtype=torch.bool), logits, against


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    """A model with uniform logits has perplexity V, and divergence 0 from itself."""
    tokens, mask, _, _ = random_case()
    flat = torch.zeros(2, 7, 11)
    result = score(tokens, mask, flat, flat)
    assert result.predictions == 12
    assert math.exp(result.loss / 12) == pytest.approx(11, rel=1e-6)
    assert result.divergence == pytest.approx(0, abs=1e-9)
    assert result.agreements == 12


def test_sums_agree_with_torch():
    """Loss, divergence and agreement equal those computed by torch over all predictions."""
    tokens, mask, logits, against = random_case()
    result = score(tokens, mask, logits, against)
    target = tokens[:, 1:].reshape(-1)
    ours, theirs = (x[:, :-1].reshape(-1, 11) for x in (logits, against))
    assert result.loss == pytest.approx(cross_entropy(ours, target, reduction="sum").item())
    assert result.against_loss == pytest.approx(
        cross_entropy(theirs, target, reduction="sum").item()
    )
    log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
    expected = kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    assert result.divergence == pytest.approx(expected, rel=1e-5)
    assert result.agreements == (ours.argmax(-1) == theirs.argmax(-1)).sum().item()


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_count(left):
    """The tokens at padding, and the amount of padding, do not change the score."""
    tokens, mask, logits, against = random_case(rows=1)
    alone = score(tokens[:, :4], mask[:, :4], logits[:, :4], against[:, :4])
    padded = mask.clone()
    padded[:, 4:] = False
    if left:
        tokens, padded, logits, against = (x.roll(3, 1) for x in (tokens, padded, logits, against))
    assert score(tokens, padded, logits, against) == alone
    assert score(tokens, torch.zeros_like(padded), logits, against) == Score()


def test_scores_of_chunks_add_up():
    """Merging the scores of rows gives the score of the batch, in any grouping."""
    tokens, mask, logits, against = random_case(rows=3)
    parts = [
        score(tokens[i : i + 1], mask[i : i + 1], logits[i : i + 1], against[i : i + 1])
        for i in range(3)
    ]
    whole = score(tokens, mask, logits, against)
    assert parts[0].merge(parts[1]).merge(parts[2]) == whole
    assert Score.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("compares", [False, True])
def test_a_gpu_gives_the_same_score(compares):
    """With and without another model, the sums computed on a device equal the CPU's."""
    *case, against = random_case()
    on_cpu = score(*case, against if compares else None)
    with pretended_device():
        *case, against = (each.cuda() for each in (*case, against))
        assert score(*case, against if compares else None) == on_cpu


@pytest.mark.parametrize("shape", [(1, 5), (256, 96), (40, 50_257)])
def test_labels_are_those_of_torch_multinomial(shape):
    """Labels, and the generator's state after them, equal those of torch.multinomial."""
    p_TV = torch.softmax(3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)), dim=-1)
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    assert torch.equal(_draw(p_TV, ours), torch.multinomial(p_TV, 1, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
