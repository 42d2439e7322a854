"""Gates that one rising threshold closes, and gains of the open ones, by scaled gradients.

Shape suffixes: K directions of a linear, N gates: K + 1, its directions and last its tail, which
are the S = N steps of its curve.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orchestrator.models.training.gate_scores import LearnedGates
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.plan.curve import PathCurve

EVIDENCE = 4.0
"""Evidence for a factor of 1 of every curve, in nats: that of a standard deviation of a half."""
SMALLEST, LARGEST = 0.2, 5.0
"""Bounds of the factor of a curve."""
MOMENTUM = 0.9
"""Weight of the mean of earlier gradients of a gain."""
AVERAGED = 0.8
"""Weight of the mean of earlier gains in those of a snapshot."""
FIRST = 1e9
"""Score of the step that is kept in any case."""
STATE = ("open", "threshold", "worth", "evidence", "gain", "mean", "averaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSettings:
    """Settings of the gates of a path; see `allocate.gates.threshold_path`."""

    gains: bool
    prior: float
    memory: float
    tokens: int
    """Number of learned tokens."""
    step_tokens: float
    """Mean number of tokens of a step."""


class PathTask(NamedTuple):
    """Curves and settings of a path, for the workers."""

    curves: Mapping[str, PathCurve]
    """Curves of the linears that have gates, by name."""
    settings: PathSettings


class PathGates(LearnedGates):
    """Gates of one linear that close where κ v is at most the threshold, from its last step on.

    κ and the gains are those of `allocate.gates.threshold_path.ThresholdPath`, from the gradients h
    of the gates: of closed ones, tail included, for κ, and of the open ones of a linear that is cut
    for gains. The gates of a linear that is whole are 1. What the threshold closes stays closed;
    the first direction never closes.

    A step's worth is κ v at the threshold that closed it, no less than the threshold before and no
    more than it; of an open step the last κ v, and no less than the last threshold.

    State: 12 bytes a gate for gains and 8 for worths. Cost of a step: O(N). The device is not read.
    """

    def __init__(self, gated: GatedLowRankLinear, curve: PathCurve, settings: PathSettings) -> None:
        super().__init__(gated)
        self._settings = settings
        device = self._gates.device
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._curve_S = torch.tensor(curve.worth_S, **wide).clamp(max=FIRST)
        self._loss_S = torch.tensor(curve.loss_S, **wide)
        self._curvature_K = torch.tensor(2 * settings.tokens * curve.energy_K, **wide)
        self._place_S = torch.arange(self.count, device=device)
        self.open = torch.full((1,), self.count, device=device)
        """Number of open steps; all of them: the linear is whole."""
        self.threshold = torch.zeros(1, **wide)
        self.worth = self._curve_S.clone()
        self.evidence = torch.zeros(2, **wide)
        """Gain of opening all closed gates, and the same by the curve, in nats over tokens."""
        self.gain = torch.ones_like(self._gates)
        self.mean = torch.zeros_like(self._gates)
        self.averaged = torch.ones_like(self._gates)

    @property
    def is_cut(self) -> Tensor:
        """True if the tail is closed, bool [1]."""
        return self.open < self.count

    def open_gates(self) -> Tensor:
        """Return which gates are open, bool [N]."""
        return self._place_S < self.open

    @property
    def factor(self) -> Tensor:
        """Factor κ of the curve, float64 []."""
        found, expected = self.evidence
        factor: Tensor = (EVIDENCE + found) / (EVIDENCE + expected)
        return factor.clamp(SMALLEST, LARGEST)

    @torch.no_grad()
    def update(self, step: int, rate: float, *, penalty: float, polarisation: float = 0.0) -> None:
        """Perform a step, counted from 1, clear the gradient, and close gates.

        Args:
            penalty: The threshold, in nats a token and value.
        """
        gradient_N, is_open_N = self.gradient, self.open_gates()
        self._collect(gradient_N, is_open_N)
        if self._settings.gains:
            self._move(gradient_N[:-1], is_open_N[:-1] & self.is_cut, rate)
        self._close(penalty)
        self.clear()
        self.apply()

    def _collect(self, gradient_N: Tensor, is_open_N: Tensor) -> None:
        """Add the evidence of a step's gradients."""
        found = -gradient_N.double().masked_fill(is_open_N, 0.0).sum()
        # the loss of a whole linear is 0, as are its closed gates
        expected = 2 * self._loss_S.gather(0, self.open.clamp(max=self.count - 1)).squeeze(0)
        expected = torch.where(self.is_cut.squeeze(0), expected, 0.0)
        step = torch.stack([found, expected]).mul_(self._settings.step_tokens)
        self.evidence.mul_(self._settings.memory).add_(step)

    def _move(self, gradient_K: Tensor, moves_K: Tensor, rate: float) -> None:
        """Move the gains that the mask selects."""
        precision = self._settings.prior**-2
        self.mean.add_(torch.where(moves_K, gradient_K - self.mean, 0.0), alpha=1 - MOMENTUM)
        slope_K = self.mean.double() * self._settings.tokens + (self.gain - 1) * precision
        move_K = (slope_K / (self._curvature_K + precision)).to(self.gain)
        self.gain.sub_(torch.where(moves_K, move_K, 0.0), alpha=rate)
        self.averaged.lerp_(self.gain, 1 - AVERAGED)

    def _close(self, threshold: float) -> None:
        """Close the open steps that are worth no more than a threshold, except the first one."""
        is_open_S = self.open_gates()
        worth_S = self.factor * self._curve_S
        keeps_S = worth_S > threshold
        keeps_S[0] = True
        self.open = torch.minimum(self.open, keeps_S.sum(0, keepdim=True))
        self.worth = torch.where(is_open_S, worth_S.maximum(self.threshold), self.worth)
        closes_S = is_open_S & (self._place_S >= self.open)
        self.threshold.fill_(threshold)
        self.worth = torch.where(closes_S, self.worth.minimum(self.threshold), self.worth)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the gates of the next passes."""
        is_open_N = self.open_gates()
        gates_K = torch.where(self.is_cut, self.gain, 1.0) * is_open_N[:-1]
        self.set(torch.cat([gates_K, is_open_N[-1:].to(gates_K)]))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, themselves, by name."""
        return {part: getattr(self, part) for part in STATE}


def path_scores(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of a block's linears, float32 [N], from its state: the logarithm of the
    worth over the last threshold, above 0 for open steps and at most 0 for closed ones."""
    scores: dict[str, Tensor] = {}
    for key, worth_S in state.items():
        part, _, name = key.partition(".")
        if part == "worth":
            is_open_S = torch.arange(len(worth_S)) < state[f"open.{name}"]
            log_S = (worth_S / state[f"threshold.{name}"]).log().float()
            least = torch.finfo(torch.float32).tiny
            scores[name] = torch.where(is_open_S, log_S.clamp(min=least), log_S.clamp(max=0.0))
    return scores


def path_gains(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged gains of a block's linears, float32 [K], from its state."""
    prefix = "averaged."
    return {n.removeprefix(prefix): each for n, each in state.items() if n.startswith(prefix)}
