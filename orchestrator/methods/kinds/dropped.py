"""Results for experts that are dropped or kept as a whole: one number for each."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.methods.kinds.base import Errors, Kind
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment
from orchestrator.plan.saliency import Saliency

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.linalg.activation import Activation
    from orchestrator.methods.kinds.costs.base import KindCost


class DroppedKind(Kind["Activation"]):
    """Saliency of the expert that a linear belongs to; a linear is dense or gone."""

    sizes: ClassVar[tuple[str, ...]] = ()

    @property
    def cost(self) -> "KindCost":
        from orchestrator.methods.kinds.costs.one_number import OneNumberCost

        return OneNumberCost()

    def facts(self, name: str, weight_OI: "Tensor", result: "Activation") -> dict[str, Any]:
        mean = float(result.mean())
        saliency = Saliency(name=name, mean=mean, tokens=result.tokens)
        return {"curve": saliency.to_json(), "numerics": {"saliency": mean}}

    def tensors(self, result: "Activation", dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return the saliency, float64 [1]; a file needs no tensor of a linear that is gone."""
        return {"saliency": result.mean().reshape(1)}

    def curve(self, facts: Mapping[str, Any]) -> Saliency:
        return Saliency.from_json(facts["curve"])

    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Return 1 for both: no value of the linear is kept."""
        return {"activation_error": 1.0, "weight_error": 1.0}


DROPPED = DroppedKind()
