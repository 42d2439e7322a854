"""Sparse results: all entries of a weight, most important first."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from orchestrator.methods.kinds.base import Errors, Kind, StoredLinear, prefix_entries
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.sparsity.sparse import Sparse
    from orchestrator.methods.kinds.costs.base import KindCost


class SparseKind(Kind["Sparse"]):
    """Entries in the order in which they are kept; losses are known every 5 % of the density."""

    sizes: ClassVar[tuple[str, ...]] = ("nonzeros",)

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.sparse import SparseCost

        return SparseCost()

    def facts(self, name: str, weight_OI: "Tensor", result: "Sparse") -> dict[str, Any]:
        energies_P = result.energies_P.cpu().numpy()
        return {
            "curve": Curve(name=name, energies=energies_P, total=result.total).to_json(),
            "activation_losses": result.activation_losses,
            "weight_losses": result.weight_losses,
            "numerics": result.report,
        }

    def tensors(self, result: "Sparse", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return values in float32 and positions, whatever the `dtype` of factors."""
        return {"values": result.values_N, "positions": result.positions_N}

    def curve(self, facts: Mapping[str, Any]) -> Curve:
        return Curve.from_json(facts["curve"])

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Interpolate the measured losses.

        The norm is interpolated, since it is closer to linear than its square.
        """
        found = {}
        for name in ("activation", "weight"):
            losses = facts[f"{name}_losses"]
            kept = np.linspace(0, linear.values, len(losses))
            lost = float(np.interp(assigned.nonzeros, kept, np.sqrt(losses))) ** 2
            found[f"{name}_error"] = lost / losses[0] if losses[0] else 0.0
        return found

    def entries(
        self, stored: StoredLinear, *, rank: int, nonzeros: int
    ) -> tuple["Tensor", "Tensor"]:
        return prefix_entries(stored, nonzeros)


SPARSE = SparseKind()
