"""Interface of an allocator, and the measurements that it asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import Field
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

from orchestrator.allocate.budget import Budget
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import Divided
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan


class Scoring(Enum):
    """Losses of the model that are measured after the decomposition, for an allocator."""

    NONE = "none"
    MASKS = "masks"
    """Losses of masked models; the allocator learns from them which candidates are kept."""
    SENSITIVITIES = "sensitivities"
    """Losses of models with a single linear cut, at every rank of the allocator's grid."""
    PLANS = "plans"
    """Losses of models that are cut by whole plans, on held-out text; the allocator says which."""
    GATES = "gates"
    """Scores of all directions, learned together on the loss of the gated model."""


class Allocator(Protocol):
    """A frozen dataclass, of this class, whose fields are its options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    source: ClassVar[str] = ""
    """Publication, `arXiv 2312.05821`; empty if it was derived here."""
    reconstruction: ClassVar[str] = ""
    """Sentence for the report on what of the publication is not known, so that it is ours; empty if
    all is known."""
    departure: ClassVar[str] = ""
    """Difference from the publication, in a sentence; empty where that of a method says it."""
    use: ClassVar[str] = ""
    """Advice on when to take it, in a sentence; empty as `departure`."""
    divides: ClassVar[tuple[Divided, ...]] = ("ranks",)
    """Parts of linears that a plan is made of; see `Form.divided`."""
    scoring: ClassVar[Scoring] = Scoring.NONE
    needs_cosines: ClassVar[bool] = False
    """True if it asks for the cosine of every sublayer of a targeted linear."""
    is_for_cache: ClassVar[bool] = False
    """True if it is about keys and values alone, so that other targeted linears are refused, unless
    the cost is that of the cache."""
    needs_block_cosines: ClassVar[bool] = False
    """True if it asks for the cosine of every block of a targeted linear."""

    @property
    def divides_costs(self) -> bool:
        """True if the cost of `Budget` is divided itself, not values alone.

        Of others, the plan of the largest kept fraction of values within the cost is taken.
        """
        return False

    @property
    def drop(self) -> Literal["no", "zero", "reroute"]:
        """Experts that a plan of ranks may drop: none; some, with routers as they are, or without
        the rows of those."""
        return "no"

    def __init__(self, **options: Any) -> None:
        """Raises UsageError for an option's value that is not allowed."""
        return None

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """`cosines`: by `Linear.sublayer`, the mean over calibration tokens of the cosine between
        the residual stream before and after it; where they are asked for, by its
        number, `3`, that of a whole block."""
        ...

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `Budget.total` for a budget that no plan meets.

        Args:
            linears: Joint linears of groups; of another cost than values their members.
        """
        budget.total(linears)

    @property
    def is_even(self) -> bool:
        """True if every linear keeps the same fraction of its values, up to rounding."""
        return False

    def facts(
        self, linears: Sequence[Linear], cosines: Mapping[str, float], plan: Plan
    ) -> dict[str, Any]:
        """Return entries of the report about a plan, by name; none by default."""
        return {}

    def scoring_passes(self, num_linears: int) -> float:
        """Return the cost of `scoring`, in passes of one sequence through the whole model.

        Args:
            num_linears: Number of targeted linears.
        """
        return 0.0
