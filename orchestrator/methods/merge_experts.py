"""Merging of experts by clusters of their outputs (HC-SMoE, ICML 2025, arXiv 2410.08589)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.methods.base import Method
from orchestrator.methods.kinds.tied import TIED, TiedKind

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.activation import OutputDistances


@dataclass(frozen=True, slots=True)
class MergeExperts(Method):
    """Clusters of experts of a block become one expert each, with the mean of their weights.

    Experts i and j are |o_i - o_j|₂ apart, o_i the mean output of expert i over all calibration
    tokens, also those that the router sends elsewhere: means over the tokens of each expert would
    tell the tokens apart, not the experts. Clusters are merged by average linkage. Each matrix of a
    cluster is the mean of its members', weighted by the tokens that are routed to them. The router
    keeps its rows, so several of its choices lead to one expert, which a token may then use twice.

    Linears of experts alone are targeted and counted; the rest of the model is dense. A forward
    pass runs every expert on every token: E / K times the products of experts, with K of E experts
    for a token.

    Departures from the authors' code: where a router scales the inputs of experts (Llama 4), so are
    those of the outputs here; biases stay those of each expert. The number of clusters follows
    from the kept fraction; see the allocation `merge-experts`.
    """

    name: ClassVar[str] = "merge-experts"
    source: ClassVar[str] = "arXiv 2410.08589"
    departure: ClassVar[str] = (
        "The number of clusters follows from the kept fraction; where the router scales inputs, "
        "so are those of the outputs; biases are not merged."
    )
    use: ClassVar[str] = "To compare with: low rank lost less at equal bytes in our results."
    decomposition: ClassVar[str] = "expert-outputs"
    form: ClassVar[str] = "tied"
    allocation: ClassVar[str] = "merge-experts"
    expert_activations: ClassVar[bool] = True
    expert_outputs: ClassVar[bool] = True

    @property
    def kind(self) -> TiedKind:
        return TIED

    def decompose(self, weight_OI: "Tensor", statistic: Any, rank: int) -> "OutputDistances":
        """Return the statistic: weights are merged when the plan has the clusters.

        Raises:
            ValueError: It is no `OutputDistances`.
        """
        from orchestrator.linalg.activation import OutputDistances

        if not isinstance(statistic, OutputDistances):
            raise ValueError("merge-experts needs distances of experts, not a Gram")
        return statistic
