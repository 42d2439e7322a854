"""Scores of a model: loss on a text and divergence from another model, as sums over tokens.

Shape suffixes: B sequences, T tokens, P predictions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from orchestrator.device.transport import bring

SLICE_TOKENS = 256
"""Predictions computed at once: probabilities of 256 over a vocabulary of 128k take 0.1 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums over predictions; the scores of chunks add up to the score of a text.

    A prediction is a real token that follows a real token. All sums are float64 over float32
    log-probabilities.
    """

    predictions: int = 0
    loss: float = 0.0
    """Σ −log q(token) with the model's distribution q, in nats."""
    windows: int = 0
    """Number of sequences that have a prediction."""
    window_loss: float = 0.0
    """Σ over sequences of their mean loss; published perplexities are exp of its mean."""
    against_loss: float = 0.0
    """Σ −log p(token) with the other model's distribution p."""
    against_window_loss: float = 0.0
    divergence: float = 0.0
    """Σ KL(p ‖ q), in nats."""
    agreements: int = 0
    """Number of predictions whose most probable token is the same in p and q."""

    def merge(self, other: Self) -> Self:
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return type(self)(**sums)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Score":
        return cls(**value)


def score(
    tokens_BT: Tensor,
    mask_BT: Tensor,
    logits_BTV: Tensor,
    against_BTV: Tensor | None,
    *,
    predicting_BT: Tensor | None = None,
) -> Score:
    """Compute the score of one chunk, with each of its sequences as a window of its own.

    Costs two passes over the vocabulary per token; logits are cast to float32 slice by slice. With
    tokens and mask on the host, a GPU is synchronised once per sequence.

    Args:
        against_BTV: Logits of the other model; None: no comparison.
        predicting_BT: Real tokens whose predictions count, see `Chunk.predicting`; None: all.
    """
    predicting_BT = mask_BT if predicting_BT is None else predicting_BT
    device = logits_BTV.device
    total = Score()
    for row in range(len(tokens_BT)):
        real_P = predicting_BT[row, :-1] & mask_BT[row, 1:]
        where_P = real_P.nonzero().squeeze(1)
        if not len(where_P):
            continue
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        follows_P = bring(tokens_BT[row, where_P + 1], device)
        slices = (torch.split(each, SLICE_TOKENS) for each in (bring(where_P, device), follows_P))
        for slice_P, target_P in zip(*slices, strict=True):
            other_PV = None if against_BTV is None else against_BTV[row, slice_P]
            sums += _sums(target_P, logits_BTV[row, slice_P], other_PV)
        loss, against_loss, divergence, agreements = sums.tolist()
        total = total.merge(
            Score(
                predictions=len(where_P),
                loss=loss,
                windows=1,
                window_loss=loss / len(where_P),
                against_loss=against_loss,
                against_window_loss=against_loss / len(where_P),
                divergence=divergence,
                agreements=round(agreements),
            )
        )
    return total


def _sums(target_P: Tensor, logits_PV: Tensor, against_PV: Tensor | None) -> Tensor:
    """Sum loss, the other model's loss, divergence and agreements over predictions, float64 [4]."""
    log_q_PV = logits_PV.float().log_softmax(dim=-1)
    loss = -log_q_PV.gather(1, target_P[:, None]).double().sum()
    if against_PV is None:
        return pad(loss[None], (0, 3))
    log_p_PV = against_PV.float().log_softmax(dim=-1)
    against_loss = -log_p_PV.gather(1, target_P[:, None]).double().sum()
    divergence_P = (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(dim=-1, dtype=torch.float64)
    agreements = (log_p_PV.argmax(dim=-1) == log_q_PV.argmax(dim=-1)).sum()
    return torch.stack([loss, against_loss, divergence_P.sum(), agreements.double()])


def draw_label_gradient(logits_BTV: Tensor, mask_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Compute the logit gradient of −Σ log p(label), with a label drawn from p per real token.

    It is `p − 1[label]` [B, T, V], p the model's own distribution, in the logits' dtype, and zero
    outside the mask. The second moment of such gradients with respect to a tensor is its Fisher
    information. All real tokens count, also the last of a sequence: a drawn label needs no next
    token.

    Args:
        mask_BT: On the host; otherwise the device is read once, for the mask.
        generator: Generator on the logits' device.
    """
    grad_BTV = torch.zeros_like(logits_BTV)
    for row, real_T in enumerate(mask_BT.cpu()):
        for slice_T in torch.split(real_T.nonzero().squeeze(1), SLICE_TOKENS):
            where_T = bring(slice_T, logits_BTV.device)
            p_TV = torch.softmax(logits_BTV[row, where_T].float(), dim=-1)
            label_T1 = _draw(p_TV, generator)
            p_TV.scatter_add_(1, label_T1, torch.full_like(label_T1, -1, dtype=p_TV.dtype))
            grad_BTV[row, where_T] = p_TV.to(grad_BTV.dtype)
    return grad_BTV


def text_label_gradient(
    logits_BTV: Tensor, tokens_BT: Tensor, text_BT: Tensor, *, ahead: int = 1
) -> Tensor:
    """Compute the logit gradient of −Σ log p(label), with labels from the text.

    The label of token t is token t + `ahead` of its sequence; a token without one has no loss. It
    is `p − 1[label]` [B, T, V] in the logits' dtype. The loss is a sum over predictions, not their
    mean.

    Args:
        tokens_BT: On the host, as the next.
        text_BT: True for real tokens of text, bool [B, T]; labels are among them.
    """
    grad_BTV = torch.zeros_like(logits_BTV)
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    for row, is_text_T in enumerate(text_BT):
        places_P = is_text_T[ahead:].nonzero().squeeze(1)
        for slice_P in torch.split(places_P, SLICE_TOKENS):
            where_P = bring(slice_P, logits_BTV.device)
            label_P1 = bring(tokens_BT[row, slice_P + ahead], logits_BTV.device)[:, None]
            p_PV = torch.softmax(logits_BTV[row, where_P].to(dtype), dim=-1)
            p_PV.scatter_add_(1, label_P1, torch.full_like(label_P1, -1, dtype=p_PV.dtype))
            grad_BTV[row, where_P] = p_PV.to(grad_BTV.dtype)
    return grad_BTV


def _draw(p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one outcome per distribution, int64 [T, 1]: the first of exponential waits of rate p.

    Bit-identical to `torch.multinomial`, without its two checks of the probabilities, each of which
    reads the device.
    """
    wait_TV = torch.empty_like(p_TV).exponential_(generator=generator)
    return torch.div(p_TV, wait_TV, out=wait_TV).argmax(dim=-1, keepdim=True)
