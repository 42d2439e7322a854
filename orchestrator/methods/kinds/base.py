"""Base class of the kinds of result."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orchestrator.methods.kinds.costs.base import KindCost

R = TypeVar("R")
Factor = Literal["weight", "down"]
Errors = Mapping[str, float | None]
"""Relative errors of a linear by name: `activation_error`, Σ|Wx − W'x|² / Σ|Wx|² over the
calibration tokens, and `weight_error`, |W − W'|² / |W|² in the Frobenius norm. None: not known."""


class StoredLinear(Protocol):
    """The tensors that a unit holds of one linear, or of several that share a basis."""

    def whole(self, name: str) -> "Tensor":
        """Return a tensor, contiguous, on the reader's device."""
        ...

    def prefix(self, name: str, rows: int, columns: range | None = None) -> "Tensor":
        """Return the first rows of a tensor, of these columns if given; see `whole`."""
        ...


class Kind(ABC, Generic[R]):
    """A kind of result: all that the system has to know about the results of a method.

    A worker calls `facts` and `tensors` once a linear is decomposed, and `factor` and `entries`
    when a plan has chosen its size. The driver, which has the facts alone, calls `curve` for the
    allocation and `errors` for the report. A forecast reads `cost`. Loaded without torch; linalg
    and costs are imported where used.
    """

    sizes: ClassVar[tuple[str, ...]]
    """Fields of an `Assignment` that say how much of a linear is kept."""
    has_exact_errors: ClassVar[bool] = True
    """False if `errors` are estimates, which a check of the files does not compare with."""

    has_additive_errors: ClassVar[bool] = True
    """False if the weight error of directions in another order than the stored one is no sum over
    them, so that `errors` of such a cut are estimates."""

    @property
    def cost(self) -> "KindCost":
        """Cost of a result for the forecast: that of two factors, `LOW_RANK`, by default.

        A kind that stores or computes anything else overrides it with a `KindCost` of its own.
        """
        from orchestrator.methods.kinds.costs.low_rank import LowRankCost

        return LowRankCost()

    @abstractmethod
    def facts(self, name: str, weight_OI: "Tensor", result: R) -> dict[str, Any]:
        """Return what the driver is told of a result, as JSON.

        `curve` is the input of the allocation and carries the linear's name; `numerics` is the
        report of the computation; the rest is for `errors`.
        """

    @abstractmethod
    def tensors(self, result: R, dtype: "torch.dtype") -> dict[str, "Tensor"]:
        """Return the tensors that a unit stores, to be cut to any size later.

        On the device of the result, not necessarily contiguous; factors in `dtype`.
        """

    @abstractmethod
    def curve(self, facts: Mapping[str, Any]) -> Any:
        """Return the input of the allocation."""

    @abstractmethod
    def errors(self, facts: Mapping[str, Any], linear: Linear, assigned: Assignment) -> Errors:
        """Return the errors of a linear at the size that a plan has chosen."""

    def factor(
        self,
        stored: StoredLinear,
        part: Factor,
        channels: range | None,
        *,
        rank: int,
        nonzeros: int,
    ) -> "Tensor":
        """Return `weight` [O, R] or `down` [R, I] at a rank, contiguous, on the reader's device.

        Args:
            channels: Outputs of `weight`, or inputs of `down`, of the linear among those of all
                linears that are stored together; None: all.
            nonzeros: Entries beside which the factors stand.

        Raises:
            ValueError: Results of this kind have no factors.
        """
        raise ValueError(f"{type(self).__name__} has no factors; {part!r} was asked for")

    def entries(
        self, stored: StoredLinear, *, rank: int, nonzeros: int
    ) -> tuple["Tensor", "Tensor"]:
        """Return the kept entries by ascending position: values and flat positions, [N].

        Args:
            rank: Rank of the factors beside which the entries stand.

        Raises:
            ValueError: Results of this kind have no entries.
        """
        raise ValueError(f"{type(self).__name__} has no entries")

    def decomposed(self, stored: StoredLinear, weight_OI: "Tensor") -> "Tensor":
        """Return the weight whose decomposition the result is: the dense one, unless it was pruned.

        Args:
            weight_OI: The dense weight, on the reader's device; returned itself if it is that.
        """
        return weight_OI

    def part(self, stored: StoredLinear, part: str, *, rank: int, nonzeros: int) -> "Tensor":
        """Return another part of a form, as its `FormTensor` names it, on the reader's device.

        Raises:
            ValueError: Results of this kind have no such part.
        """
        raise ValueError(f"{type(self).__name__} has no part {part!r}")


def prefix_factor(
    stored: StoredLinear, part: str, rank: int, channels: range | None = None
) -> "Tensor":
    """Return a factor of which ranks are stored as rows, cut to its first ranks."""
    rows = stored.prefix(part, rank, channels)
    return rows if part.startswith("down") else rows.T.contiguous()


def prefix_entries(stored: StoredLinear, nonzeros: int) -> tuple["Tensor", "Tensor"]:
    """Return the first of the stored `values` and `positions`, by ascending position."""
    positions_N, order_N = stored.prefix("positions", nonzeros).sort()
    return stored.prefix("values", nonzeros)[order_N], positions_N
