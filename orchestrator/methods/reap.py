"""REAP: router-weighted expert activation pruning (Lasby et al., ICLR 2026, arXiv 2510.13999)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.methods.base import Method
from orchestrator.methods.kinds.dropped import DROPPED, DroppedKind

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.activation import Activation


@dataclass(frozen=True, slots=True)
class Reap(Method):
    """Drop the experts with the least saliency of each block; all else stays as it is.

    The saliency of expert j is the mean of g_j(x) |f_j(x)|₂ over the tokens x that are routed to
    it, with g_j the router's weight and f_j the expert's output. An expert without a token has
    saliency 0. Only linears of experts are targeted and counted; the rest of the model is dense.

    Cost: one forward pass; 2 H operations a token of an expert, one number for each expert.

    Departures: of Llama 4, where the router scales the inputs x by s, the norm is |f_j(s x)|₂; the
    number of experts follows from the kept fraction, which also ranks all blocks together with
    `scope` `model` (see the allocation `reap`).
    """

    name: ClassVar[str] = "reap"
    source: ClassVar[str] = "arXiv 2510.13999"
    departure: ClassVar[str] = (
        "The number of experts follows from the kept fraction; where the router scales inputs, "
        "so are those of the norm."
    )
    use: ClassVar[str] = (
        "For a model of the same class with fewer experts; `two-sided` lost less in our results."
    )
    decomposition: ClassVar[str] = "reap"
    form: ClassVar[str] = "dropped"
    allocation: ClassVar[str] = "reap"
    expert_activations: ClassVar[bool] = True

    @property
    def kind(self) -> DroppedKind:
        return DROPPED

    def decompose(self, weight_OI: "Tensor", statistic: Any, rank: int) -> "Activation":
        """Return the expert's activation.

        Raises:
            InputError: It is NaN or infinite.
        """
        from orchestrator.linalg.activation import Activation

        if not isinstance(statistic, Activation):
            raise ValueError("reap needs the activation of an expert, not a Gram")
        statistic.mean()
        return statistic
