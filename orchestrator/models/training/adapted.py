"""Adapters beside gates: a trained low-rank term of a linear, and its steps of Adam.

Shape suffixes: O outputs, I inputs, A rank of the adapter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orchestrator.models.training.gate_scores import BETAS, GatePull, GateScores
from orchestrator.models.training.gated import GatedLowRankLinear

SCALE = 0.5
"""Factor of the product: alpha over rank, 16 / 32 in the authors' code."""
UNIT = 0.02
"""Rate of adapters over that of scores: masks of the authors begin at 0.02 and have one rate with
the adapters."""
EPSILON = 1e-8


class Adapter(nn.Module):
    """Term SCALE B A x of the outputs of a linear; B is 0 at the start, and so is the term.

    Values are float32 and computed in the dtype of x. Entries of A are uniform within
    ± 1 / sqrt(I), as LoRA's. A (O + I) multiply-adds a token, and three times that backward.

    Args:
        size: O, I and A.
        draw: Generator of A, on the CPU.
    """

    def __init__(
        self, size: tuple[int, int, int], draw: torch.Generator, device: torch.device
    ) -> None:
        super().__init__()
        outputs, inputs, rank = size
        right_AI = (2 * torch.rand(rank, inputs, generator=draw) - 1) / inputs**0.5
        self.left_OA = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.right_AI = nn.Parameter(right_AI.to(device))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., O] of inputs [..., I], in the inputs' dtype."""
        inner = linear(input, self.right_AI.to(input.dtype))
        return SCALE * linear(inner, self.left_OA.to(input.dtype))


class AdaptedScores(GateScores):
    """Scores of gates, and the adapter of the same linear, which follows Adam without decay.

    Its rate is UNIT times that of the scores. Memory: 16 bytes a value of the adapter.
    """

    def __init__(self, gated: GatedLowRankLinear, pull: GatePull, adapter: Adapter) -> None:
        super().__init__(gated, pull)
        self._values = {"left": adapter.left_OA, "right": adapter.right_AI}
        self._means = {name: torch.zeros_like(each) for name, each in self._values.items()}
        self._squares = {name: torch.zeros_like(each) for name, each in self._values.items()}

    @property
    def numbers(self) -> int:
        """Number of trained values."""
        return self.count + sum(each.numel() for each in self._values.values())

    @torch.no_grad()
    def update(self, step: int, rate: float, *, penalty: float, polarisation: float = 0.0) -> None:
        """Perform a step of the scores and of the adapter, and clear all gradients."""
        first, second = BETAS
        for name, value in self._values.items():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            mean, square = self._means[name], self._squares[name]
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            root = square.sqrt().div_((1 - second**step) ** 0.5).add_(EPSILON)
            value.addcdiv_(mean, root, value=-rate * UNIT / (1 - first**step))
        super().update(step, rate, penalty=penalty, polarisation=polarisation)

    def clear(self) -> None:
        """Clear the gradients."""
        super().clear()
        for value in self._values.values():
            value.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, themselves, by name."""
        parts: dict[str, dict[str, Tensor]] = {
            "": {**self._values},
            "_mean": self._means,
            "_square": self._squares,
        }
        own = {
            f"{name}{part}": tensor.detach()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        return super().state() | own


def adapter_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters of a block's linears as factors with ranks as rows, float32.

    `NAME.weight` is SCALE B^T [A, O] and `NAME.down` A [A, I], as units store factors.
    """
    found = {}
    for key, tensor in state.items():
        if key.startswith("left."):
            name = key.removeprefix("left.")
            found[f"{name}.weight"] = (SCALE * tensor).T.contiguous()
            found[f"{name}.down"] = state[f"right.{name}"].contiguous()
    return found
