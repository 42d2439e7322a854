"""Results of a pruned weight with factors beside its entries.

Shape suffixes: O outputs, I inputs, R rank, N entries.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from orchestrator.methods.kinds.base import Errors, Factor, Kind, StoredLinear, prefix_factor
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment
from orchestrator.plan.surface import Surface

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.sparsity.two_sided_sparse import SparseLowRank
    from orchestrator.methods.kinds.costs.base import KindCost


class SparseLowRankKind(Kind["SparseLowRank"]):
    """The weight itself, from which entries are taken, and factors for some numbers of entries.

    Args:
        steps: Conjugate gradient steps by which kept entries are fitted to what the stored factors
            leave of the weight; 0: they stay the weight's own.
    """

    sizes: ClassVar[tuple[str, ...]] = ("rank", "nonzeros")
    has_exact_errors: ClassVar[bool] = False

    def __init__(self, steps: int) -> None:
        self._steps = steps

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.sparse_low_rank import SparseLowRankCost

        return SparseLowRankCost()

    def facts(self, name: str, weight_OI: "Tensor", result: "SparseLowRank") -> dict[str, Any]:
        mixes = result.mixes_P
        surface = Surface(
            name=name,
            nonzeros=np.array([mix.nonzeros for mix in mixes]),
            ranks=np.array([mix.rank for mix in mixes]),
            losses=np.array([mix.loss for mix in mixes]),
            activation_losses=np.array([mix.activation_loss for mix in mixes]),
            weight_losses=np.array([mix.weight_loss for mix in mixes]),
        )
        return {"curve": surface.to_json(), "numerics": result.report}

    def tensors(self, result: "SparseLowRank", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return the weight as it is, diagonals, and factors with ranks as rows.

        The factors are in `dtype`; their names end in the number of entries that they stand beside.
        If entries are to be fitted, the correlations of both statistics are stored too.
        """
        stored = {
            "dense": result.weight_OI,
            "curvature": result.curvature_O,
            "square": result.square_I,
        }
        if result.correlations is not None:
            names = "curvature.correlations", "square.correlations"
            stored |= dict(zip(names, result.correlations, strict=True))
        for nonzeros, (weight_OR, down_RI) in result.factors.items():
            stored[f"weight.{nonzeros}"] = weight_OR.T.to(dtype)
            stored[f"down.{nonzeros}"] = down_RI.to(dtype)
        return stored

    def curve(self, facts: Mapping[str, Any]) -> Surface:
        return Surface.from_json(facts["curve"])

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Interpolate between measured points, before entries are fitted.

        Fitting lowers the loss; the error of the weight may rise.
        """
        return self.curve(facts).errors(assigned.rank, assigned.nonzeros)

    def factor(
        self,
        stored: StoredLinear,
        part: Factor,
        channels: range | None,
        *,
        rank: int,
        nonzeros: int,
    ) -> "Tensor":
        return prefix_factor(stored, f"{part}.{nonzeros}", rank)

    def entries(
        self, stored: StoredLinear, *, rank: int, nonzeros: int
    ) -> tuple["Tensor", "Tensor"]:
        """Return the most important entries, on the host, positions in int64.

        They are fitted to what the factors of this rank, as stored, leave of the weight.
        """
        import torch

        from orchestrator.linalg.sparsity.fit_entries import fit_entries, second_moment_of
        from orchestrator.linalg.sparsity.two_sided_sparse import entry_order

        weight_OI, curvature_O, square_I = map(stored.whole, ("dense", "curvature", "square"))
        positions_N = entry_order(weight_OI, curvature_O, square_I)[:nonzeros].sort().values
        values_N = weight_OI.flatten()[positions_N]
        if not self._steps:
            return values_N.cpu(), positions_N.cpu()
        rest_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32), copy=True)
        rest_OI.view(-1)[positions_N] = 0
        if rank:
            weight_RO, down_RI = (
                stored.whole(f"{part}.{nonzeros}")[:rank] for part in ("weight", "down")
            )
            rest_OI -= weight_RO.T.to(rest_OI) @ down_RI.to(rest_OI)
        curvature_OO = second_moment_of(curvature_O, stored.whole("curvature.correlations"))
        moment_II = second_moment_of(square_I, stored.whole("square.correlations"))
        step_N = fit_entries(rest_OI, positions_N, curvature_OO, moment_II, steps=self._steps)
        return (values_N + step_N).to(values_N.dtype).cpu(), positions_N.cpu()
