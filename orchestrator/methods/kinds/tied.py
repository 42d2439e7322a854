"""Results for experts that are merged: distances from the other experts, and the tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.methods.kinds.base import Errors, Kind
from orchestrator.plan.expert_distances import ExpertDistances
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.activation import OutputDistances
    from orchestrator.methods.kinds.costs.base import KindCost


class TiedKind(Kind["OutputDistances"]):
    """Distances of an expert; means of dense weights are made when a file is written."""

    sizes: ClassVar[tuple[str, ...]] = ()

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.one_number import OneNumberCost

        return OneNumberCost()

    def facts(self, name: str, weight_OI: "Tensor", result: "OutputDistances") -> dict[str, Any]:
        apart = tuple(result.distances_E.tolist())
        curve = ExpertDistances(name=name, tokens=result.tokens, distances=apart)
        return {"curve": curve.to_json(), "numerics": {}}

    def tensors(self, result: "OutputDistances", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return the number of tokens, int64 [1], by which weights are averaged."""
        import torch

        return {"tokens": torch.tensor([result.tokens])}

    def curve(self, facts: Mapping[str, Any]) -> ExpertDistances:
        return ExpertDistances.from_json(facts["curve"])

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Return None for both: they depend on the other members of the cluster."""
        return {"activation_error": None, "weight_error": None}


TIED = TiedKind()
