"""Low-rank results: two factors, nested in rank, with the energies that truncation loses."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from orchestrator.methods.kinds.base import Errors, Factor, Kind, StoredLinear, prefix_factor
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.affine import AffineLowRank
    from orchestrator.linalg.low_rank import LowRank
    from orchestrator.linalg.scaled import ScaledLowRank
    from orchestrator.linalg.two_sided import TwoSidedLowRank
    from orchestrator.methods.kinds.costs.base import KindCost

L = TypeVar("L", bound="LowRank")
S = TypeVar("S", bound="ScaledLowRank")


class LowRankKind(Kind[L]):
    """Factors whose energies are those of the outputs and whose left factor is orthonormal."""

    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    def facts(self, name: str, weight_OI: "Tensor", result: L) -> dict[str, Any]:
        import torch

        energies_K = result.energies_K.cpu().numpy()
        norm = torch.linalg.vector_norm(weight_OI, dtype=torch.float64)
        return {
            "curve": Curve(name=name, energies=energies_K, total=result.total).to_json(),
            "weight_energies": self._weight_energies(result).tolist(),
            "weight_total": float(norm.square()),
            "numerics": result.report,
        }

    def _weight_energies(self, result: L) -> "Tensor":
        """Return the part of |W|² that each direction explains, float64 [R]."""
        import torch

        norm_R: Tensor = torch.linalg.vector_norm(result.down_RI, dim=1, dtype=torch.float64)
        return norm_R.square()

    def tensors(self, result: L, dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return both factors with ranks as rows."""
        return {"weight": result.weight_OR.T.to(dtype), "down": result.down_RI.to(dtype)}

    def curve(self, facts: Mapping[str, Any]) -> Curve:
        return Curve.from_json(facts["curve"])

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Return the fractions that the directions which are cut have of both totals.

        The curve is that of the outputs, unless the facts have one apart.
        """
        curve, rank = self.curve(facts), assigned.rank
        energies = facts.get("activation_energies", curve.energies)
        return {
            "activation_error": _tail(energies, rank, facts.get("activation_total", curve.total)),
            "weight_error": _tail(facts["weight_energies"], rank, facts["weight_total"]),
        }

    def factor(
        self,
        stored: StoredLinear,
        part: Factor,
        channels: range | None,
        *,
        rank: int,
        nonzeros: int,
    ) -> "Tensor":
        return prefix_factor(stored, part, rank, channels)


class ScaledKind(LowRankKind[S]):
    """Factors whose energies are in another norm; those of the outputs are told beside them."""

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.low_rank import ScaledCost

        return ScaledCost()

    def facts(self, name: str, weight_OI: "Tensor", result: S) -> dict[str, Any]:
        return super().facts(name, weight_OI, result) | {
            "activation_energies": result.activation_R.tolist(),
            "activation_total": result.activation_total,
        }


class OrderedKind(ScaledKind["ScaledLowRank"]):
    """Factors whose directions are those of the plain SVD, in the order of an importance."""

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.ordered import OrderedCost

        return OrderedCost()


class TwoSidedKind(ScaledKind["TwoSidedLowRank"]):
    """Factors that are orthonormal in the curvature's norm, so their shares of |W|² are apart."""

    has_additive_errors = False

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.two_sided import TwoSidedCost

        return TwoSidedCost()

    def _weight_energies(self, result: "TwoSidedLowRank") -> "Tensor":
        return result.weight_R


class AffineKind(ScaledKind["AffineLowRank"]):
    """Factors beside a bias, which follows from the rank: the means that it keeps are stored."""

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.low_rank import AffineCost

        return AffineCost()

    def facts(self, name: str, weight_OI: "Tensor", result: "AffineLowRank") -> dict[str, Any]:
        return super().facts(name, weight_OI, result) | {"mean_energy": result.mean_energy}

    def tensors(self, result: "AffineLowRank", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return both factors with ranks as rows, and the means of inputs and outputs, float64."""
        means = {"input_mean": result.input_mean_I, "output_mean": result.output_mean_O}
        return super().tensors(result, dtype) | means

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Return the fraction of the outputs that factors and bias lose, and that of the weight.

        The bias keeps the mean of the outputs, so that only what varies can be lost.
        """
        total, rank = facts["activation_total"], assigned.rank
        lost = _tail(facts["activation_energies"], rank, total) * total
        whole = total + facts["mean_energy"]
        return {
            "activation_error": lost / whole if whole else 0.0,
            "weight_error": _tail(facts["weight_energies"], rank, facts["weight_total"]),
        }

    def part(self, stored: StoredLinear, part: str, *, rank: int, nonzeros: int) -> "Tensor":
        """Return `bias` [O], by which the stored factors of this rank keep the mean output."""
        from orchestrator.linalg.affine import affine_bias

        if part != "bias":
            return super().part(stored, part, rank=rank, nonzeros=nonzeros)
        weight_OR = prefix_factor(stored, "weight", rank)
        means = stored.whole("output_mean"), stored.whole("input_mean")
        return affine_bias(*means, weight_OR, prefix_factor(stored, "down", rank))


LOW_RANK: LowRankKind["LowRank"] = LowRankKind()
SCALED: ScaledKind["ScaledLowRank"] = ScaledKind()
ORDERED = OrderedKind()
TWO_SIDED = TwoSidedKind()
AFFINE = AffineKind()


def _tail(energies: Sequence[float] | np.ndarray, kept: int, total: float) -> float:
    """Return the fraction of a total that the first energies do not hold."""
    return max(1.0 - float(np.sum(energies[:kept])) / total, 0.0) if total else 0.0
