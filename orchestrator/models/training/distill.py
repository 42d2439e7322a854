"""Distillation losses: KL to another model, cross-entropy of the text, and their gradients.

Shape suffixes: B sequences, T tokens, V vocabulary, K stored outcomes.
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
    """Distribution per token: its most probable outcomes and the total of all others.

    Takes K 8 + 4 bytes per token: 1.08 GB for K = 256 and 256 × 2048 tokens, for a model of any
    size (a full vocabulary of 128k in 16 bits would take 134 GB).
    """

    log_p_BTK: Tensor
    """Log-probabilities of the K outcomes, float32, in descending order."""
    index_BTK: Tensor
    """Token ids of the K outcomes, int32."""
    log_rest_BT: Tensor
    """Log-probability of all other tokens together, float32; minus infinity if K = V."""

    @classmethod
    def of(cls, logits_BTV: Tensor, most: int, temperature: float) -> Self:
        """Compute the distribution `softmax(logits / temperature)` with K = min(most, V).

        Computed on the logits' device in float32, slice by slice.
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
        """Return the tensors by name, on the CPU, for storage."""
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
    """Loss sums over a chunk: float64 sums of float32 values, in nats."""

    divergence: float
    """Σ over real tokens of τ² KL(p ‖ q), p the targets and q the model, at temperature τ."""
    cross_entropy: float
    """Σ −log q(token) over real tokens that follow a real token, at τ = 1."""

    def to_json(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "cross_entropy": self.cross_entropy}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of a chunk's loss sums in the loss of its step."""

    divergence: float
    cross_entropy: float


def distill(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    targets: TopK | Tensor | None,
    *,
    temperature: float,
    weights: LossWeights | None = None,
) -> tuple[Losses, Tensor | None]:
    """Compute the losses of logits z and, if weights are given, the weighted sum's gradient.

    With q = softmax(z / τ) and p the targets' distribution over all of V,

        KL = Σ_v p_v (log p_v − log q_v),          τ² dKL/dz = τ (q − p).

    `TopK` contains only the outcomes k and the rest r. The KL over these K + 1 outcomes is a lower
    bound of the full one, and equal to it if K = V. Its gradient is that of full targets which
    distribute the rest in the same proportions as the model,

        dKL/dz_v = q_v − p_v for v among k,        q_v − p_r q_v / q_r for the others,

    so it does not change those proportions. The factor τ² keeps the gradient's scale independent
    of τ (Hinton et al., arXiv:1503.02531). Uses closed forms in float32 over slices of tokens, so
    no third tensor of the size of logits and gradient is allocated. The gradient [B, T, V] has the
    logits' dtype and is zero outside the mask. The logits' device is read once, at the end.

    Args:
        tokens_BT, mask_BT: On the host; otherwise the device is read first.
        targets: Top-k of the other model at that temperature, its full logits, or None: KL is 0.
    """
    device = logits_BTV.device
    targets = _brought(targets, device)
    grad_BTV = None if weights is None else torch.zeros_like(logits_BTV)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for row, (tokens_T, mask_T) in enumerate(zip(tokens_BT.cpu(), mask_BT.cpu(), strict=True)):
        for slice_T in torch.split(mask_T.nonzero().squeeze(1), SLICE_TOKENS):
            if not len(slice_T):
                continue
            where_T, label_T, real_T = bring(_predictions(tokens_T, mask_T, slice_T), device)
            real_T = real_T.bool()
            logits_TV = logits_BTV[row, where_T].float()
            divergence, grad_TV = _divergence(
                logits_TV,
                targets,
                row,
                where_T,
                temperature=temperature,
                has_gradient=weights is not None,
            )
            log_q_TV = logits_TV.log_softmax(dim=-1)
            entropy_T = -log_q_TV.gather(1, label_T[:, None]).squeeze(1).double()
            sums += torch.stack([divergence, entropy_T.where(real_T, 0.0).sum()])
            if grad_BTV is not None and grad_TV is not None and weights is not None:
                grad_TV *= weights.divergence
                if weights.cross_entropy:
                    pull_TV = _cross_entropy_gradient(log_q_TV, label_T, real_T)
                    grad_TV += weights.cross_entropy * pull_TV
                grad_BTV[row, where_T] = grad_TV.to(grad_BTV.dtype)
    divergence, cross_entropy = sums.tolist()
    return Losses(divergence=divergence, cross_entropy=cross_entropy), grad_BTV


def _brought(targets: TopK | Tensor | None, device: torch.device) -> TopK | Tensor | None:
    if targets is None or isinstance(targets, Tensor):
        return targets if targets is None else bring(targets, device)
    return targets.to(device)


def _predictions(tokens_T: Tensor, mask_T: Tensor, where_T: Tensor) -> Tensor:
    """Stack positions of some real tokens, next tokens, and if those are real; int64 [3, T]."""
    following_T = (where_T + 1).clamp(max=len(tokens_T) - 1)
    is_followed_T = torch.cat([mask_T[1:], mask_T.new_zeros(1)])
    return torch.stack((where_T, tokens_T[following_T], is_followed_T[where_T]))


def _cross_entropy_gradient(log_q_TV: Tensor, label_T: Tensor, real_T: Tensor) -> Tensor:
    """Gradient of −log q(label) with respect to the logits; overwrites `log_q_TV`."""
    grad_TV = log_q_TV.exp_()
    grad_TV.scatter_add_(1, label_T[:, None], -torch.ones_like(grad_TV[:, :1]))
    return grad_TV.where(real_T[:, None], 0.0)


def _divergence(
    logits_TV: Tensor,
    targets: TopK | Tensor | None,
    row: int,
    where_T: Tensor,
    *,
    temperature: float,
    has_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum τ² KL over some tokens, float64; also its gradient with respect to their logits."""
    if targets is None:
        zero = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
        return zero, torch.zeros_like(logits_TV) if has_gradient else None
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
    # the model's distribution over the rest, scaled to the targets' probability of the rest
    grad_TV = q_TV if rest_TV is None else q_TV - r_T[:, None] * rest_TV.softmax(dim=-1)
    return divergence, temperature * grad_TV.scatter_add(1, index_TK, -p_TK)
