"""LPAF: prune first, then factorise what is left (arXiv 2306.14152, a reconstruction)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.errors import UsageError
from orchestrator.methods.base import Labels, Method
from orchestrator.methods.kinds.pruned_low_rank import PRUNED, PrunedKind
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import check_choice, check_number

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, OutputGram
    from orchestrator.linalg.sparsity.pruned_low_rank import PrunedLowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Lpaf(Method):
    """The truncated SVD of Λ (M ∘ W), divided by Λ: M keeps the entries that the loss feels most.

    The score of an entry is |W_ij G_ij|, G the gradient of the text's loss by the weight, summed
    over all calibration tokens: the change of the loss to first order if the entry goes. M keeps
    the fraction `density` of the entries of every linear. Λ weighs row o by (Σ_j M_oj S_oj)^(1/2)
    (`linalg.sparsity.pruned_low_rank`).

    A reconstruction: of the publication only the abstract is known here. It says that fine-tuned
    weights have full rank, that first-order pruning leaves weights of low rank, and that factors
    start from a sparsity-aware SVD; formulas, density and code were not found, so scores, weights
    of rows and the density are ours. Its pruning follows a training, movement scores, which are
    not here. Its training of sparse and factored weights mixed comes after: `--train` with
    `training.mixed` (`models.training.mixed`), for which the mask is stored beside the factors.

    The premise can be tested: the report has the rank of M ∘ W beside that of W, and the energy
    that as many directions as the plan gives hold of both. A mask without empty rows or columns
    leaves full rank as soon as its density is above ln n / n.
    """

    name: ClassVar[str] = "lpaf"
    source: ClassVar[str] = "arXiv 2306.14152"
    departure: ClassVar[str] = (
        "A reconstruction from the abstract: scores by one backward pass, the weights of rows and "
        "the density are ours, as is the course of its mixed training (`training.mixed`)."
    )
    use: ClassVar[str] = (
        "To see in the report if pruned weights have a lower rank; it lost far more than "
        "`svd-llm` in our results."
    )
    reconstruction: ClassVar[str] = (
        "Of arXiv 2306.14152 the abstract is known: scores, weights of rows and density are ours."
    )
    gradient: ClassVar[Literal["curvature", "weight", "directions"]] = "weight"

    density: float = 0.5
    """Fraction of the entries of a linear that pruning keeps; 1 prunes none."""
    scores: Literal["taylor"] = "taylor"
    """Scores of entries: `taylor`, |Σ W ∘ G| in one backward pass."""
    weights: Literal["rows", "none"] = "rows"
    """Weights of the truncation: of the rows, or none."""
    norm: Literal["weight", "inputs"] = "weight"
    """Norm of the truncation on the side of the inputs: that of the weight, or of the outputs on
    the calibration tokens."""

    def __post_init__(self) -> None:
        check_number("lpaf: density", self.density, 1e-6, 1)
        if self.scores != "taylor":
            raise UsageError(
                f"lpaf: scores is {self.scores!r}; movement scores need a training of the dense "
                "model, which no stage does; give 'taylor'"
            )
        check_choice("lpaf: weights", self.weights, ("rows", "none"))
        check_choice("lpaf: norm", self.norm, ("weight", "inputs"))

    @property
    def kind(self) -> PrunedKind:
        return PRUNED

    @property
    def label_draws(self) -> int:
        return 1

    @property
    def labels(self) -> Labels:
        return "next"

    @property
    def decomposition(self) -> str:
        about = f"density={float(self.density)} weights={self.weights} norm={self.norm}"
        return f"pruned-svd scores={self.scores} {about}"

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """Return `input`: factors of a pruned weight are no projections of the dense outputs."""
        return "input"

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "PrunedLowRank":
        from orchestrator.linalg.gradients import WeightGradient
        from orchestrator.linalg.low_rank import InputGram
        from orchestrator.linalg.sparsity.pruned_low_rank import decompose_pruned

        gradient = statistic.gradient
        if not isinstance(statistic, InputGram) or not isinstance(gradient, WeightGradient):
            raise ValueError("lpaf needs the gradient of the weight beside the Gram of the inputs")
        return decompose_pruned(
            weight_OI,
            statistic,
            (weight_OI * gradient.matrix_OI).abs(),
            rank,
            density=self.density,
            weighs_rows=self.weights == "rows",
            weighs_inputs=self.norm == "inputs",
        )
