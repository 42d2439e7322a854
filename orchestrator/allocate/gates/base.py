"""Base of allocators that learn gates: what the stage `learn` asks of them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.budget import Budget
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import check_number, check_whole

GateKind = Literal["pulled", "polarised", "thresholds", "gains"]
"""Steps of gates: an L1 term pulls their scores to 0 (`Learned`); a loss drives them to 0 or 1
(`Soco`); a rising threshold closes them (`ThresholdPath`); none closes, they are gains alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateAllocator(Allocator):
    """Base of allocators with `Scoring.GATES`: they take curves with learned scores."""

    scoring: ClassVar[Scoring] = Scoring.GATES
    name: ClassVar[str]
    """Name of the allocation, in messages about its options."""
    gates: ClassVar[GateKind]
    batch: int = 4
    """Sequences of a step."""
    cross_entropy: float = 1.0
    """Weight of the cross-entropy of the text's next tokens, averaged over predictions."""
    divergence: float = 0.0
    """Weight of KL(dense || gated), averaged over tokens."""
    every: int = 50
    """Steps between snapshots."""
    held_out: float = 0.125
    """Fraction of the sequences on which the loss at a snapshot is measured, for the report."""

    def __post_init__(self) -> None:
        check_whole(f"{self.name}: batch", self.batch, 1, 100_000)
        check_number(f"{self.name}: cross_entropy", self.cross_entropy, 0, 1e6)
        check_number(f"{self.name}: divergence", self.divergence, 0, 1e6)
        check_whole(f"{self.name}: every", self.every, 1, 100_000)
        check_number(f"{self.name}: held_out", self.held_out, 1e-6, 0.5)

    @property
    def divides_costs(self) -> bool:
        return True

    @property
    @abstractmethod
    def rate(self) -> float: ...

    @property
    @abstractmethod
    def steps(self) -> int:
        """Largest number of steps."""

    @property
    def expected_steps(self) -> int:
        """Number of steps, for the forecast."""
        return self.steps

    @property
    def penalty_by(self) -> str:
        """Weight of a gate in the L1 term: "cost", the values that it saves, or "count", 1."""
        return "cost"

    @property
    def tail(self) -> str:
        """ "gate" or "full": gates above break-even; see `Learned`."""
        return "gate"

    @property
    def adapters(self) -> int:
        """Rank of adapters; 0: none."""
        return 0

    @property
    def gain_budgets(self) -> tuple[float, ...]:
        """Kept fractions with gains of their own, ascending; none by default."""
        return ()

    @property
    def snapshot_gains(self) -> bool:
        """True if the snapshots have gains, and a plan takes those of the nearest one."""
        return False

    def gain_budget(self, kept: float) -> float | None:
        """Return the budget whose gains a plan of this size takes; None: it has none."""
        return None

    @abstractmethod
    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Return what drives the gates in a step, counted from 1: the weight of the L1 term, or the
        slope of the size, or the threshold; and the weight of the polarisation.

        Args:
            kept: Kept fraction by the gates before it; 1 if they are not polarised.
        """

    @abstractmethod
    def ends_at(self, kept: float) -> bool:
        """Test if a kept fraction of open gates ends the learning before its last step."""

    def check_reached(self, kept: float, budget: Budget) -> None:
        """Raise InfeasibleError for a budget too far below the kept fraction of open gates; by
        default plans raise it."""
        return None

    @abstractmethod
    def decisive(self) -> dict[str, Any]:
        """Options that decide the scores."""

    def begin(
        self, linears: Sequence[Linear], curves: Mapping[str, Curve], form: Form, tokens: int
    ) -> "GateAllocator":
        """Return the allocator with what its steps need of the curves; itself, if that is none.

        Args:
            tokens: Number of calibration tokens.
        """
        return self

    def scoring_passes(self, num_linears: int) -> float:
        """Return three passes for a sequence of a step: forward, forward again, and back."""
        return 3.0 * self.expected_steps * self.batch
