"""Interfaces of allocators that ask for losses of the model, as the scoring stages use them."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from orchestrator.allocate.base import Scoring
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.allocate.sparsity.bernoulli import Baseline, CandidatePool, Draw
from orchestrator.allocate.sparsity.choice import Choice
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan


@runtime_checkable
class SensitivityAllocator(Protocol):
    """Allocator with `Scoring.SENSITIVITIES`: it takes curves with losses by rank."""

    @property
    def windows(self) -> int:
        """Number of calibration sequences, the first ones, on which a loss is measured."""
        ...

    @property
    def kept(self) -> tuple[float, ...]:
        """Kept fractions of the grid, ascending, for the report."""
        ...

    def ranks(self, linear: Linear, allowed: AllowedRanks) -> tuple[int, ...]:
        """Ranks at which the loss is measured, ascending."""
        ...

    def rank(self, linear: Linear, kept: float, allowed: AllowedRanks) -> int:
        """Rank of a kept fraction of the grid; 0 if none."""
        ...


@runtime_checkable
class MaskAllocator(Protocol):
    """Allocator with `Scoring.MASKS`: it learns probabilities of candidates from losses of masks.

    Shape suffix: N candidates.
    """

    @property
    def iterations(self) -> int: ...

    @property
    def samples(self) -> int:
        """Masked models per iteration."""
        ...

    @property
    def chunks(self) -> int:
        """Number of calibration sequences, the first ones, on which a loss is measured."""
        ...

    @property
    def keep_better(self) -> bool:
        """True if the first choice is kept unless the loss of the last one is smaller."""
        ...

    @property
    def learns(self) -> bool:
        """False if the first choice is the plan, without losses."""
        ...

    def pool(
        self, linears: Sequence[Linear], candidates: Mapping[str, Candidates], budget: Budget
    ) -> CandidatePool:
        """Candidates of all linears."""
        ...

    def start(self, pool: CandidatePool, budget: int) -> np.ndarray:
        """Probabilities before the first loss, [N]."""
        ...

    def new_baseline(self) -> Baseline:
        """Baseline of the losses, empty."""
        ...

    def step(
        self,
        pool: CandidatePool,
        probability_N: np.ndarray,
        draws: Sequence[Draw],
        baseline: Baseline,
        *,
        budget: int,
    ) -> np.ndarray:
        """Probabilities after the losses of an iteration, [N]."""
        ...

    def plan(self, pool: CandidatePool, choice: Choice, budget: int) -> Plan:
        """Plan of a choice of candidates."""
        ...


@runtime_checkable
class PlanAllocator(Protocol):
    """Allocator with `Scoring.PLANS`: its plans are points of a box, compared by their losses."""

    @property
    def text(self) -> str:
        """Held-out text on which plans are compared; empty if none was given."""
        ...

    @property
    def sequences(self) -> int:
        """Number of sequences of the text, the first ones."""
        ...

    @property
    def divergence(self) -> float:
        """Weight of the divergence from the dense model, beside the cross-entropy."""
        ...

    @property
    def trials(self) -> int:
        """Number of measured plans."""
        ...

    @property
    def batch(self) -> int:
        """Plans that are chosen at once."""
        ...

    @property
    def sampler(self) -> Literal["gp", "tpe", "random"]:
        """Sampler of further points."""
        ...

    def bounds(self, linears: Sequence[Linear]) -> tuple[tuple[float, float], ...]:
        """Least and largest value of each coordinate."""
        ...

    def even(self, linears: Sequence[Linear], budget: Budget) -> tuple[float, ...]:
        """Point in the middle of the search."""
        ...

    def locate(self, linears: Sequence[Linear], plan: Plan) -> tuple[float, ...]:
        """Point next to any plan."""
        ...

    def kept(self, linears: Sequence[Linear], plan: Plan) -> Mapping[str, float]:
        """Kept fraction of each group of linears, for the report."""
        ...

    def plan(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        point: tuple[float, ...],
    ) -> Plan:
        """Plan of a point."""
        ...


INTERFACES: Mapping[Scoring, type] = {
    Scoring.MASKS: MaskAllocator,
    Scoring.PLANS: PlanAllocator,
    Scoring.SENSITIVITIES: SensitivityAllocator,
    Scoring.GATES: GateAllocator,
}
"""Interface of the allocators that ask for these losses."""
