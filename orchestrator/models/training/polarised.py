"""Gates between closed and amplified that a loss polarises, and their steps of Adam.

Shape suffixes: R directions, N = R + 1 gates of a linear: its directions, and last its tail; K kept
directions of a plan.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.models.training.gate_scores import LearnedGates
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear

LARGEST = 2.0
"""Bound of a gate; half of it, 1, is where logits of 0 begin."""
PARTED = 0.5
"""Gate at which the polarisation parts those that close from those that stay open."""
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class LogitGates(LearnedGates):
    """Gates s = 2 sigmoid(a) of one linear, whose logits a follow Adam, in float32."""

    def __init__(self, gated: GatedLowRankLinear, logit_N: Tensor) -> None:
        super().__init__(gated)
        self.logit_N = logit_N
        self.mean_N, self.square_N = torch.zeros_like(logit_N), torch.zeros_like(logit_N)

    @property
    def gates_N(self) -> Tensor:
        """Gates of the next passes."""
        return gates_of(self.logit_N)

    @torch.no_grad()
    def _step(self, slope_N: Tensor, step: int, rate: float) -> None:
        """Perform a step, counted from 1, down a slope by the gates; clear the gradient."""
        first, second = BETAS
        gates_N = self.gates_N
        gradient_N = gates_N * (1 - gates_N / LARGEST) * slope_N
        self.mean_N.lerp_(gradient_N, 1 - first)
        self.square_N.mul_(second).addcmul_(gradient_N, gradient_N, value=1 - second)
        root_N = self.square_N.sqrt().div_((1 - second**step) ** 0.5).add_(EPSILON)
        self.logit_N.addcdiv_(self.mean_N, root_N, value=-rate / (1 - first**step))
        self.clear()
        self.apply()

    def apply(self) -> None:
        """Write the gates of the next passes."""
        self.set(self.gates_N)

    def open_gates(self) -> Tensor:
        """Return which gates are above a half, bool [N]."""
        return self.gates_N > PARTED

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, themselves, by name."""
        return {"logit": self.logit_N, "mean": self.mean_N, "square": self.square_N}


class PolarisedGates(LogitGates):
    """Gates s = 2 sigmoid(a) of one linear, of which the logits a are trained.

    The loss is that of the gated model, with gradient h by the gates, and, over all linears,

        λ1 |ρ - target| + λ2(t) Σ w s̃ (1 - s̃),    ρ = Σ w_tail s̃_tail + Σ w_i max(s̃_i, s̃_tail)

    with s̃ = min(s, 1) and w_i the values that gate i stands for over those of all linears. For
    gates of 0 and 1 ρ is the kept fraction: a linear whose tail is open is stored whole. The first
    term drives ρ to its target, the second every gate to 0 or 1; neither sees how far a gate is
    above 1, where only the model's loss moves it: without the min, amplified directions would be
    punished. Slopes at the kinks are those from below for ρ (else no gate would leave 1, where all
    begin) and from above for the polarisation. Adam without decay, on a, in float32.

    Reconstruction of SoCo (arXiv 2502.15092) by its abstract and a digest: scores above 1 that
    amplify, a differentiable parameter ratio, KL to the dense model, polarisation. The form of s
    and of both terms, the tail and the weights are ours; a "deviation" term of the original is
    unknown and missing.

    State: 12 bytes a gate. Cost of a step: O(N). The device is not read.

    Args:
        fractions_N: w, float32; of the directions and last of the tail.
    """

    def __init__(self, gated: GatedLowRankLinear, fractions_N: Tensor) -> None:
        self._fractions_N = fractions_N.to(gated.gates_R.device)
        super().__init__(gated, torch.zeros_like(self._fractions_N))

    def size(self) -> Tensor:
        """Part of ρ that this linear is, float64 []."""
        bounded_N = self.gates_N.double().clamp(max=1)
        return (self._fractions_N.double() * bounded_N.maximum(bounded_N[-1])).sum()

    def _size_slope(self, gates_N: Tensor) -> Tensor:
        """Slope of ρ by the gates; of a direction that the tail stores, the tail's."""
        bounded_N = gates_N.clamp(max=1)
        is_tails_N = bounded_N < bounded_N[-1]
        slope_N = torch.where(is_tails_N, 0.0, self._fractions_N)
        slope_N[-1] += (self._fractions_N * is_tails_N).sum()
        return slope_N * (gates_N <= 1)

    @torch.no_grad()
    def update(self, step: int, rate: float, *, penalty: float, polarisation: float) -> None:
        """Perform a step, counted from 1, clear the gradient, and set the gates.

        Args:
            penalty: λ1 times the sign of ρ - target.
            polarisation: λ2 of the step.
        """
        gates_N = self.gates_N
        mixed_N = self._fractions_N * (1 - 2 * gates_N) * (gates_N < 1)
        terms_N = penalty * self._size_slope(gates_N) + polarisation * mixed_N
        self._step(self.gradient + terms_N, step, rate)


class DirectionGains(LogitGates):
    """Gains of the directions of one linear that a plan keeps, trained on the model's loss alone.

    The model is the compressed one, so that what gains learn is what its weights will be. An open
    gate of the learning is where its gain begins, and a closed one, kept by a larger size, at 1.

    Ours, as the training of gains after that of gates is.

    Args:
        gated: Without a tail; its factors are those of the plan.
        gates_K: Gates that the directions had at the end of the learning.
    """

    def __init__(self, gated: GatedLowRankLinear, gates_K: Tensor) -> None:
        assert gated.tail is None
        gates_K = gates_K.to(gated.gates_R)
        begun_K = torch.where(gates_K > PARTED, torch.logit(gates_K / LARGEST), 0.0)
        super().__init__(gated, begun_K)
        self.apply()

    def update(
        self, step: int, rate: float, *, penalty: float = 0.0, polarisation: float = 0.0
    ) -> None:
        """Perform a step, counted from 1, clear the gradient, and set the gates."""
        self._step(self.gradient, step, rate)


def gates_of(logit_N: Tensor) -> Tensor:
    """Return the gates of logits."""
    return LARGEST * logit_N.sigmoid()


def gate_fractions(linear: Linear, form: Form, directions: int, total: int) -> Tensor:
    """Return the values that the gates of a linear stand for over `total`, float32 [N].

    A direction stands for what it adds to the factors, in the order in which directions are
    stored, and the tail for the rest of the dense weight: O I / total together.
    """
    values = [form.factor_values(linear, rank) for rank in range(directions + 1)]
    each_N = torch.tensor([*values, linear.values], dtype=torch.float64).diff()
    return (each_N / total).float()


def final_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gates of a block's linears, [N] or [K], by name, from its state."""
    names = [name.removeprefix("logit.") for name in state if name.startswith("logit.")]
    return {name: gates_of(state[f"logit.{name}"]) for name in names}


def scores_and_gains(gates_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores [N], above 0 for open gates, and gains [R], the gates of the directions."""
    return gates_N - PARTED, gates_N[:-1]
