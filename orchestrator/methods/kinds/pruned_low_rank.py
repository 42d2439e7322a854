"""Low-rank results of pruned weights, with the spectra of both."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.methods.kinds.base import Errors, StoredLinear
from orchestrator.methods.kinds.low_rank import ScaledKind
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.sparsity.pruned_low_rank import PrunedLowRank
    from orchestrator.methods.kinds.costs.base import KindCost


class PrunedKind(ScaledKind["PrunedLowRank"]):
    """Factors of a pruned weight, whose errors are those against the dense weight.

    The errors name beside these the part of the squared singular values that the rank holds of the
    pruned weight, `pruned_energy`, and of the dense one, `dense_energy`.
    """

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.pruned_low_rank import PrunedCost

        return PrunedCost()

    def _weight_energies(self, result: "PrunedLowRank") -> "Tensor":
        return result.weight_R

    def facts(self, name: str, weight_OI: "Tensor", result: "PrunedLowRank") -> dict[str, Any]:
        spectra = {"pruned": result.pruned_K.tolist(), "dense": result.dense_K.tolist()}
        return super().facts(name, weight_OI, result) | {"spectra": spectra}

    def tensors(self, result: "PrunedLowRank", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return both factors with ranks as rows, and the mask of the pruning, packed to bits."""
        return super().tensors(result, dtype) | {"mask": result.mask_B}

    def decomposed(self, stored: StoredLinear, weight_OI: "Tensor") -> "Tensor":
        """Return M ∘ W; see `Kind`."""
        from orchestrator.linalg.sparsity.pruned_low_rank import masked

        return masked(weight_OI, stored.whole("mask"))

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        held = {
            f"{name}_energy": _part(energies, assigned.rank)
            for name, energies in facts["spectra"].items()
        }
        return {**super().errors(facts, linear, assigned), **held}


def _part(energies: list[float], rank: int) -> float:
    """Return the part of energies that the first ones have; 1 if there are none."""
    total = float(np.sum(energies))
    return float(np.sum(energies[:rank])) / total if total else 1.0


PRUNED = PrunedKind()
