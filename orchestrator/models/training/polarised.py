"""Gates between closed and amplified that a loss polarises, and their steps of Adam.

Shape suffixes: R directions, N = R + 1 gates of a linear: its directions, and last its tail.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.models.training.gated import GatedLowRankLinear

LARGEST = 2.0
"""Bound of a gate; half of it, 1, is where logits of 0 begin."""
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class PolarisedGates:
    """Gates s = 2 sigmoid(a) of one linear, of which the logits a are trained.

    The loss is that of the gated model, with gradient h by the gates, and, over all linears,

        λ1 |ρ - target| + λ2(t) Σ w s̃ (1 - s̃),    ρ = Σ w s̃,    s̃ = min(s, 1),

    w_i the values that gate i stands for over the values of all linears, so that ρ is the kept
    fraction of open gates. The first term drives ρ to its target, the second every gate to 0 or 1;
    neither sees how far a gate is above 1, where only the model's loss moves it: without the min,
    amplified directions would be punished. Slopes at the kinks are those from below for ρ (1 at
    s = 1, where all gates begin, or none would ever move) and from above for the polarisation (0).
    Adam without decay, on a alone, in float32.

    Reconstruction of SoCo (arXiv 2502.15092) by its abstract and a digest: scores above 1 that
    amplify, a differentiable parameter ratio, KL to the dense model, polarisation. The form of s,
    of both terms and the weights are ours; a "deviation" term of the original is unknown and
    missing.

    State: 12 bytes a gate. Cost of a step: O(N). The device is not read but for `size`.

    Args:
        fractions_N: w, float32; of the directions and last of the tail.
    """

    def __init__(self, gated: GatedLowRankLinear, fractions_N: Tensor) -> None:
        assert gated.tail is not None
        self._gates_R, self._tail = gated.gates_R, gated.tail
        self._fractions_N = fractions_N.to(gated.gates_R.device)
        self.logit_N = torch.zeros_like(self._fractions_N)
        self.mean_N, self.square_N = torch.zeros_like(self.logit_N), torch.zeros_like(self.logit_N)

    @property
    def gates_N(self) -> Tensor:
        """Gates of the next passes."""
        return LARGEST * self.logit_N.sigmoid()

    @property
    def gradient_N(self) -> Tensor:
        """Gradient of the model's loss by the gates, h; 0 before a pass."""
        found = [
            torch.zeros_like(each) if each.grad is None else each.grad
            for each in (self._gates_R, self._tail)
        ]
        return torch.cat(found)

    def size(self) -> float:
        """Part of ρ that the gates of this linear are; summed in float64, with a device read."""
        kept_N = self._fractions_N.double() * self.gates_N.double().clamp(max=1)
        return float(kept_N.sum())

    @torch.no_grad()
    def update(self, step: int, rate: float, *, pull: float, polarisation: float) -> None:
        """Perform a step, counted from 1, clear the gradient, and set the gates.

        Args:
            pull: λ1 times the sign of ρ - target.
            polarisation: λ2 of the step.
        """
        first, second = BETAS
        gates_N = self.gates_N
        terms_N = pull * (gates_N <= 1) + polarisation * (1 - 2 * gates_N) * (gates_N < 1)
        slope_N = gates_N * (1 - gates_N / LARGEST)
        gradient_N = slope_N * (self.gradient_N + self._fractions_N * terms_N)
        self.mean_N.lerp_(gradient_N, 1 - first)
        self.square_N.mul_(second).addcmul_(gradient_N, gradient_N, value=1 - second)
        root_N = self.square_N.sqrt().div_((1 - second**step) ** 0.5).add_(EPSILON)
        self.logit_N.addcdiv_(self.mean_N, root_N, value=-rate / (1 - first**step))
        self._gates_R.grad = self._tail.grad = None
        self.apply()

    @torch.no_grad()
    def apply(self, threshold: float | None = None) -> None:
        """Write the gates of the next passes; those at most at a threshold are closed."""
        gates_N = self.gates_N
        if threshold is not None:
            gates_N = gates_N * (gates_N > threshold)
        self._gates_R.copy_(gates_N[:-1])
        self._tail.copy_(gates_N[-1:])

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        return {"logit": self.logit_N, "mean": self.mean_N, "square": self.square_N}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.apply()


def gate_fractions(out_features: int, in_features: int, directions: int, total: int) -> Tensor:
    """Return the values that the gates of a linear stand for over `total`, float32 [N].

    A direction stands for its m + n values, the tail for the rest of m n: 1 in all at `total` m n.
    """
    each = out_features + in_features
    tail = out_features * in_features - directions * each
    return torch.tensor([each / total] * directions + [tail / total], dtype=torch.float32)
