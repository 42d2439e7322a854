"""Ranked results: directions and entries, of which an allocation keeps any by a mask.

Shape suffixes: O outputs, I inputs, R directions, B buckets, N entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.methods.kinds.base import Errors, Kind, StoredLinear
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment
from orchestrator.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.ranked import RankedParts
    from orchestrator.methods.kinds.costs.base import KindCost


class RankedKind(Kind["RankedParts"]):
    """Both parts of a robust PCA; no prefix of them is kept, but what a `Mask` selects."""

    sizes: ClassVar[tuple[str, ...]] = ("rank", "nonzeros")

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.ranked import RankedCost

        return RankedCost()

    def facts(self, name: str, weight_OI: "Tensor", result: "RankedParts") -> dict[str, Any]:
        candidates = Candidates(
            direction_utilities=result.direction_utilities_R.cpu().numpy(),
            direction_magnitudes=result.direction_magnitudes_R.cpu().numpy(),
            bucket_counts=result.bucket_counts_B.cpu().numpy(),
            bucket_utilities=result.bucket_utilities_B.cpu().numpy(),
            bucket_magnitudes=result.bucket_magnitudes_B.cpu().numpy(),
            energy=result.energy,
        )
        return {"curve": candidates.to_json() | {"name": name}, "numerics": result.report}

    def tensors(self, result: "RankedParts", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return values in float32 and positions, factors with ranks as rows, and the sketch."""
        return {
            "values": result.values_N,
            "positions": result.positions_N,
            "weight": result.weight_OR.T.to(dtype),
            "down": result.down_RI.to(dtype),
            "sketch": result.sketch_IS,
            "ridge": result.ridge_I,
        }

    def curve(self, facts: Mapping[str, Any]) -> Candidates:
        return Candidates.from_json(facts["curve"])

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Return the errors that were measured as the file was written (`MaskedParts.errors`)."""
        return {name: facts.get(name) for name in ("activation_error", "weight_error")}


RANKED = RankedKind()


@dataclass(frozen=True, slots=True)
class Mask:
    """Kept directions and entries, bool [R] and [N], in the order in which they are stored."""

    directions_R: "Tensor"
    entries_N: "Tensor"

    def drawn(self, counts_B: "Tensor") -> tuple[list[int], list[int]]:
        """Return the number of kept draws of each direction and of each bucket."""
        import torch

        parts = torch.split(self.entries_N, counts_B.tolist())
        return self.directions_R.int().tolist(), [int(part.sum()) for part in parts]


@dataclass(frozen=True, slots=True)
class CandidateValues:
    """One number for each candidate of a linear: a keep-probability, or the number of kept draws.

    So the numbers of a 70B model are some 30 MB, and masks of single entries exist in the workers
    alone.
    """

    directions_R: "Tensor"
    """float64, like those of the buckets."""
    buckets_B: "Tensor"
    counts_B: "Tensor"
    """Entries of each bucket, int64."""

    def chosen(self) -> Mask:
        """Return the mask if the numbers are counts: the first entries of each bucket are kept."""
        import torch

        starts_B = self.counts_B.cumsum(0) - self.counts_B
        place_N = torch.arange(int(self.counts_B.sum())) - self._entries(starts_B)
        return Mask(self.directions_R > 0, place_N < self._entries(self.buckets_B))

    def draw(self, *words: int | str) -> Mask:
        """Return a mask if the numbers are probabilities: all draws are independent.

        A function of the words alone, computed on the CPU: the same bits in every process.
        """
        import torch

        source = generator(*words)
        chance_R = torch.rand(len(self.directions_R), generator=source)
        chance_N = torch.rand(int(self.counts_B.sum()), generator=source)
        return Mask(chance_R < self.directions_R, chance_N < self._entries(self.buckets_B))

    def _entries(self, value_B: "Tensor") -> "Tensor":
        return value_B.repeat_interleave(self.counts_B)


@dataclass(frozen=True, slots=True)
class MaskedParts:
    """The stored parts of a linear that a mask keeps, in their order, on the reader's device."""

    weight_RO: "Tensor"
    down_RI: "Tensor"
    values_N: "Tensor"
    positions_N: "Tensor"

    @classmethod
    def whole(cls, stored: StoredLinear) -> "MaskedParts":
        """Read all parts; together the weight, but for the residual of the robust PCA."""
        return cls(*map(stored.whole, ("weight", "down", "values", "positions")))

    @classmethod
    def read(cls, stored: StoredLinear, mask: Mask) -> "MaskedParts":
        """Read the parts that a mask keeps."""
        kept = {"weight": mask.directions_R, "down": mask.directions_R}
        kept |= {"values": mask.entries_N, "positions": mask.entries_N}
        return cls(*(_rows(stored.whole(name), rows) for name, rows in kept.items()))

    def entries(self) -> tuple["Tensor", "Tensor"]:
        """Return values and positions by ascending position, [N]."""
        positions_N, order_N = self.positions_N.sort()
        return self.values_N[order_N], positions_N

    def product(self) -> "Tensor":
        """Return the dense weight, float32 [O, I]; R O I multiply-adds, R the directions kept."""
        import torch

        weight_RO, down_RI, values_N = (
            part.to(torch.float32) for part in (self.weight_RO, self.down_RI, self.values_N)
        )
        product_OI = weight_RO.T @ down_RI
        # positions are unique, so the order of the sums does not matter
        product_OI.view(-1)[self.positions_N.long()] += values_N
        return product_OI

    def errors(self, stored: StoredLinear) -> dict[str, float]:
        """Return the errors of the weight and, by the sketch of its inputs, of the outputs.

        As fractions of what all stored parts together have.
        """
        from orchestrator.linalg.ranked import sketched_energy

        whole_OI = MaskedParts.whole(stored).product()
        sketch = [stored.whole(name) for name in ("sketch", "ridge")]
        lost_OI = whole_OI - self.product()
        energies = {
            "weight_error": [float(each.double().square().sum()) for each in (lost_OI, whole_OI)],
            "activation_error": [sketched_energy(each, *sketch) for each in (lost_OI, whole_OI)],
        }
        return {name: lost / total if total else 0.0 for name, (lost, total) in energies.items()}


def _rows(whole: "Tensor", rows: "Tensor") -> "Tensor":
    return whole[rows.to(whole.device)]
