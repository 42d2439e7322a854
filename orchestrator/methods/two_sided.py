"""Two-sided whitening with one global threshold (IO-SVD 2605.15626, OBD-LLM 2604.00821)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from orchestrator.methods.base import Method
from orchestrator.methods.kinds.low_rank import TWO_SIDED, TwoSidedKind
from orchestrator.recipe.options import check_number, check_whole

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSided(Method):
    """The truncated SVD of C^(1/2) W H^(1/2), C the second moment of the loss gradients.

    To second order, and with inputs and gradients taken as independent (K-FAC, 1503.05671), each
    squared singular value that is cut costs half of itself in nats over all calibration tokens, in
    every linear alike; so one threshold (`allocate.threshold`) serves the whole model.

    C is the Fisher information of the linear's outputs: labels are drawn from the model's own
    distribution, not taken from the text, and the loss is their sum over tokens. It costs a
    forward pass that keeps the chunks at shard boundaries, and for every label a pass backward,
    which runs each shard forward again: about 3 forward passes more for one label.

    No authors' code was read. What they leave open, and we name: the damping of C, the number of
    labels, the seed of the draws (the recipe's).
    """

    name: ClassVar[str] = "two-sided"
    source: ClassVar[str] = "arXiv 2605.15626, 2604.00821"
    departure: ClassVar[str] = (
        "Damping, the number of labels and their draw are ours, as the papers leave them open."
    )
    use: ClassVar[str] = (
        "As the first choice: `--preset fast` is this with `--storage pivoted --rank-multiple "
        "auto`. Gradients cost about three forward passes more."
    )
    nats: ClassVar[bool] = True
    allocation: ClassVar[str] = "threshold"

    damping: float = 0.01
    """Term added to the diagonal of C, as a fraction of the mean of the diagonal."""
    draws: int = 1
    """Labels drawn for each token; the variance of C falls with their number."""

    def __post_init__(self) -> None:
        check_number("two-sided: damping", self.damping, 1e-6, 1000)
        check_whole("two-sided: draws", self.draws, 1, 1000)

    @property
    def kind(self) -> TwoSidedKind:
        return TWO_SIDED

    @property
    def label_draws(self) -> int:
        return self.draws

    @property
    def decomposition(self) -> str:
        return f"two-sided damping={float(self.damping)}"

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "LowRank":
        from orchestrator.linalg.two_sided import decompose_two_sided

        return decompose_two_sided(weight_OI, statistic, rank, damping=self.damping)
