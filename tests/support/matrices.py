"""Weights and second moments with known spectra, and a collection of difficult ones.

Shape suffixes: T tokens, O outputs, I inputs, K = min(O, I).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.linalg.gradients import DirectionGradients, WeightGradient
from orchestrator.linalg.low_rank import InputGram, InputMeans, OutputGram


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Make orthonormal columns; rows >= columns."""
    return torch.linalg.qr(gaussian(rows, columns, seed=seed))[0]


@dataclass(frozen=True)
class Specimen:
    """Weight with the input rows of its linear."""

    weight_OI: Tensor
    inputs_TI: Tensor

    @property
    def gram_II(self) -> Tensor:
        return self.inputs_TI.T @ self.inputs_TI

    @property
    def energies_K(self) -> Tensor:
        """Squared singular values of the outputs, computed without squaring a matrix."""
        sigma = torch.linalg.svdvals(self.weight_OI @ self.inputs_TI.T) ** 2
        energies_K = sigma.new_zeros(min(self.weight_OI.shape))
        energies_K[: len(sigma)] = sigma[: len(energies_K)]
        return energies_K

    def means(self, tokens: int | None = None) -> InputMeans:
        """Means of the first rows, all by default, as those of one group."""
        rows_TI = self.inputs_TI[:tokens]
        return InputMeans(rows_TI.sum(dim=0)[None], torch.tensor([float(len(rows_TI))]).double())

    def gradient(
        self, kind: str, tokens: int | None = None
    ) -> WeightGradient | DirectionGradients | None:
        """Gradients of ½|W x|² over the first rows, of one sequence, in the form of a method's
        trait."""
        if kind == "curvature":
            return None
        found = {"weight": WeightGradient, "directions": DirectionGradients}[kind](self.weight_OI)
        rows_TI = self.inputs_TI[:tokens]
        return found.update(found.images(rows_TI), rows_TI @ self.weight_OI.T)

    def statistic(self, side: str) -> InputGram | OutputGram:
        if side == "input":
            return InputGram(self.gram_II)
        return OutputGram(self.weight_OI @ self.gram_II @ self.weight_OI.T)

    def loss(self, approximation_OI: Tensor) -> float:
        """Compute the squared change of the outputs over all rows."""
        gap_OI = self.weight_OI - approximation_OI.double()
        return float(torch.linalg.norm(gap_OI @ self.inputs_TI.T) ** 2)


def with_spectrum(outputs: int, inputs: int, sigma_K: Tensor, seed: int = 0) -> Specimen:
    """Make a specimen whose outputs have these singular values, with correlated inputs."""
    size = len(sigma_K)
    inputs_TI = gaussian(3 * inputs, inputs, seed=seed) @ gaussian(inputs, inputs, seed=seed + 1)
    rows_TI, mix_II = torch.linalg.qr(inputs_TI)
    left_OK = orthonormal(outputs, size, seed + 2)
    right_IK = orthonormal(inputs, size, seed + 3)
    # (left sigma right^T mix^-T) (rows mix)^T = left sigma (rows right)^T
    weight_OI = torch.linalg.solve_triangular(mix_II, right_IK * sigma_K, upper=True)
    return Specimen((left_OK @ weight_OI.T).contiguous(), rows_TI @ mix_II)


def of_model(outputs: int, inputs: int, seed: int = 0) -> Specimen:
    """Make a specimen like a linear of a trained model: input energies fall by 1e5, a few
    dominate."""
    scale_I = torch.logspace(0, -2.5, inputs, dtype=torch.float64)
    scale_I[:2] *= 10
    turn_II = orthonormal(inputs, inputs, seed)
    inputs_TI = gaussian(4 * inputs, inputs, seed=seed + 1) * scale_I @ turn_II
    return Specimen(gaussian(outputs, inputs, seed=seed + 2) / inputs**0.5, inputs_TI)


def menagerie() -> dict[str, Specimen]:
    """Return all shapes and defects that a decomposition must handle."""
    decay_I = torch.logspace(0, -6, 20, dtype=torch.float64)
    low_rank_OI = gaussian(24, 5) @ gaussian(5, 20, seed=1)
    repeated_OI = gaussian(30, 12)
    repeated_OI[:, 7] = repeated_OI[:, 3]
    return {
        "tall": Specimen(gaussian(30, 12), gaussian(50, 12, seed=1)),
        "wide": Specimen(gaussian(12, 30), gaussian(70, 30, seed=1)),
        "square": Specimen(gaussian(20, 20), gaussian(50, 20, seed=1)),
        "model": of_model(40, 24),
        "few_tokens_tall": Specimen(gaussian(30, 20), gaussian(8, 20, seed=1)),
        "few_tokens_wide": Specimen(gaussian(16, 30), gaussian(8, 30, seed=1)),
        "low_rank_weight": Specimen(low_rank_OI, gaussian(50, 20, seed=2)),
        "repeated_column": Specimen(repeated_OI, gaussian(50, 12, seed=1)),
        "ill_conditioned": Specimen(gaussian(24, 20), gaussian(60, 20, seed=1) * decay_I),
        "equal_energies": with_spectrum(20, 16, torch.ones(16, dtype=torch.float64)),
        "one_row": Specimen(gaussian(1, 12), gaussian(50, 12, seed=1)),
        "one_column": Specimen(gaussian(12, 1), gaussian(50, 1, seed=1)),
        "zero_inputs": Specimen(gaussian(20, 12), torch.zeros(30, 12, dtype=torch.float64)),
        "zero_weight": Specimen(torch.zeros(12, 20, dtype=torch.float64), gaussian(50, 20)),
    }
