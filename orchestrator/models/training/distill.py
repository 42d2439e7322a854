"""How far a model is from another on a text, and from the text itself, with the way back.

Shape suffixes: B sequences, T tokens, V vocabulary, K outcomes that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from orchestrator.device.transport import bring
from orchestrator.models.evaluation.scoring import SLICE_TOKENS

_NAMES = ("log_p", "index", "log_rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A distribution for each token, kept as its most probable outcomes and all others as one.

    K 8 + 4 bytes a token: with K = 256 and 256 × 2048 tokens 1.08 GB, for 70B as for any model
    (all of a vocabulary of 128k in 16 bits would be 134 GB).
    """

    log_p_BTK: Tensor
    """Log-probabilities, float32, the highest first."""
    index_BTK: Tensor
    """The tokens that have them, int32."""
    log_rest_BT: Tensor
    """Log-probability of all other tokens together, float32; minus infinity if there are none."""

    @classmethod
    def of(cls, logits_BTV: Tensor, most: int, temperature: float) -> Self:
        """The distribution `softmax(logits / temperature)`; K is `most`, or V if that is less.

        On the logits' device; slice by slice in float32.
        """
        parts: list[list[Tensor]] = [[], [], []]
        for slice_TV in torch.split(logits_BTV.flatten(0, 1), SLICE_TOKENS):
            log_p_TV = (slice_TV.float() / temperature).log_softmax(dim=-1)
            log_p_TK, index_TK = log_p_TV.topk(min(most, log_p_TV.shape[-1]), dim=-1)
            log_rest_T = log_p_TV.scatter(1, index_TK, -torch.inf).logsumexp(dim=-1)
            for part, tensor in zip(parts, (log_p_TK, index_TK.int(), log_rest_T), strict=True):
                part.append(tensor)
        sizes = logits_BTV.shape[:2]
        log_p, index, log_rest = (torch.cat(p).reshape(*sizes, *p[0].shape[1:]) for p in parts)
        return cls(log_p_BTK=log_p, index_BTK=index, log_rest_BT=log_rest)

    def tensors(self) -> dict[str, Tensor]:
        """By name, on the CPU, to be stored."""
        values = (self.log_p_BTK, self.index_BTK, self.log_rest_BT)
        return {name: each.contiguous().cpu() for name, each in zip(_NAMES, values, strict=True)}

    def to(self, device: torch.device) -> Self:
        return type(self)(
            log_p_BTK=bring(self.log_p_BTK, device),
            index_BTK=bring(self.index_BTK, device),
            log_rest_BT=bring(self.log_rest_BT, device),
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        log_p, index, log_rest = (tensors[name] for name in _NAMES)
        return cls(log_p_BTK=log_p, index_BTK=index, log_rest_BT=log_rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Sums over a chunk; float64 over float32 values; nats."""

    divergence: float
    """Σ over real tokens of KL(p ‖ q) τ², p the targets and q the model's at temperature τ."""
    cross_entropy: float
    """Σ over real tokens that follow one of −log q(token), τ being 1."""

    def to_json(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "cross_entropy": self.cross_entropy}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """What the sums of a chunk count in the loss of its step."""

    divergence: float
    cross_entropy: float


def distill(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    targets: TopK | Tensor,
    temperature: float,
    weights: LossWeights | None = None,
) -> tuple[Losses, Tensor | None]:
    """Losses of a model's logits z, and the gradient of their weighted sum if there are weights.

    With q = softmax(z / τ) and p the targets' distribution over all of V,

        KL = Σ_v p_v (log p_v − log q_v),          τ² dKL/dz = τ (q − p).

    Of `TopK` only the outcomes k and the rest r are known: KL over these K + 1 outcomes, which is
    the least that the full one can be, and equal to it where K is V. Its gradient is that of full
    targets which divide the rest as the model itself does,

        dKL/dz_v = q_v − p_v for v among k,        q_v − p_r q_v / q_r for the others,

    so nothing pulls on how they are divided. τ² keeps the gradient's size as τ changes (Hinton et
    al., arXiv:1503.02531). Closed forms, float32 by slices of tokens, so beside logits and gradient
    there is no third tensor of their size. The gradient [B, T, V] has the logits' dtype and is zero
    outside the mask.

    Computed on the logits' device, which is read once, at the end.

    Args:
        tokens_BT, mask_BT: On the host; otherwise the device is read first.
        targets: Top-k of the other model at the same temperature, or all its logits [B, T, V].
    """
    device = logits_BTV.device
    targets = bring(targets, device) if isinstance(targets, Tensor) else targets.to(device)
    grad_BTV = None if weights is None else torch.zeros_like(logits_BTV)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for row, (tokens_T, mask_T) in enumerate(zip(tokens_BT.cpu(), mask_BT.cpu(), strict=True)):
        for slice_T in torch.split(mask_T.nonzero().squeeze(1), SLICE_TOKENS):
            if not len(slice_T):
                continue
            following_T = (slice_T + 1).clamp(max=len(tokens_T) - 1)
            parts = (slice_T, tokens_T[following_T], _followed(mask_T, slice_T))
            where_T, label_T, real_T = bring(torch.stack(parts), device)
            real_T = real_T.bool()
            logits_TV = logits_BTV[row, where_T].float()
            divergence, grad_TV = _divergence(
                logits_TV, targets, row, where_T, temperature, has_gradient=weights is not None
            )
            log_q_TV = logits_TV.log_softmax(dim=-1)
            entropy_T = -log_q_TV.gather(1, label_T[:, None]).squeeze(1).double()
            sums += torch.stack([divergence, entropy_T.where(real_T, 0.0).sum()])
            if grad_BTV is not None and grad_TV is not None and weights is not None:
                grad_TV *= weights.divergence
                if weights.cross_entropy:
                    pull_TV = log_q_TV.exp_()
                    pull_TV.scatter_add_(1, label_T[:, None], -torch.ones_like(pull_TV[:, :1]))
                    grad_TV += weights.cross_entropy * pull_TV.where(real_T[:, None], 0.0)
                grad_BTV[row, where_T] = grad_TV.to(grad_BTV.dtype)
    divergence, cross_entropy = sums.tolist()
    return Losses(divergence=divergence, cross_entropy=cross_entropy), grad_BTV


def _followed(mask_T: Tensor, where_T: Tensor) -> Tensor:
    """Which of some real tokens have a real one behind them."""
    following_T = torch.cat([mask_T[1:], mask_T.new_zeros(1)])
    return following_T[where_T]


def _divergence(
    logits_TV: Tensor,
    targets: TopK | Tensor,
    row: int,
    where_T: Tensor,
    temperature: float,
    *,
    has_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """τ² KL summed over some tokens, float64, and its gradient by their logits if it has one."""
    log_q_TV = (logits_TV / temperature).log_softmax(dim=-1)
    q_TV = log_q_TV.exp()
    if isinstance(targets, Tensor):
        log_p_TV = (targets[row, where_T].to(q_TV) / temperature).log_softmax(dim=-1)
        p_TV = log_p_TV.exp()
        total = (p_TV * (log_p_TV - log_q_TV)).sum(dim=-1, dtype=torch.float64).sum()
        return temperature**2 * total, temperature * (q_TV - p_TV) if has_gradient else None
    parts = (targets.log_p_BTK, targets.index_BTK, targets.log_rest_BT)
    log_p_TK, index_TK, log_r_T = (part[row, where_T] for part in parts)
    index_TK = index_TK.long()
    p_TK, r_T = log_p_TK.exp(), log_r_T.exp()
    total_T = (p_TK * (log_p_TK - log_q_TV.gather(1, index_TK))).sum(dim=-1, dtype=torch.float64)
    rest_TV = None
    if index_TK.shape[1] < q_TV.shape[1]:
        rest_TV = log_q_TV.scatter(1, index_TK, -torch.inf)
        total_T += (r_T * (log_r_T - rest_TV.logsumexp(dim=-1))).where(r_T > 0, 0.0)
    divergence = temperature**2 * total_T.sum()
    if not has_gradient:
        return divergence, None
    # the model's distribution over the rest, times the mass of the rest in the targets
    grad_TV = q_TV if rest_TV is None else q_TV - r_T[:, None] * rest_TV.softmax(dim=-1)
    return divergence, temperature * grad_TV.scatter_add(1, index_TK, -p_TK)
