"""Base class of the forms: how many values and bytes a linear stores in one form."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol, TypeVar

import numpy as np

from orchestrator.plan.linear import Linear

Ranks = TypeVar("Ranks", int, np.ndarray)
"""One rank or many."""
Divided = Literal[
    "ranks", "entries", "ranks and entries together", "linears", "experts", "clusters"
]
"""Parts of linears that an allocation divides a budget into."""


class Cut(Protocol):
    """Size of one linear in its form; an `Assignment` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def nonzeros(self) -> int: ...

    @property
    def basis(self) -> str:
        """Name of the linear whose basis is used, `down` [R, I] of a low rank; empty: its own."""
        ...


class Form(ABC):
    """Sizes of a linear in one form; without state.

    A form is one file with a subclass, and one line in `FORMS`; its module is one file in
    `orchestrator.models.forms`. In another package, one file each and one entry point for both.
    Number formats are apart (`plan.codecs`).

    The methods on ranks price two plain factors [O, R] and [R, I], at O + I values a rank. A form
    whose factors store fewer values overrides them; one without factors has no use for them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """Name in the model card, `low-rank, pivoted`."""
    module: ClassVar[str] = ""
    """Path of its class of `FormLinear`, `package.file:Class`; empty for dense weights alone."""
    has_rank: ClassVar[bool] = False
    has_nonzeros: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    """True if it stores a bias of its own, in the place of the dense linear's."""
    shares_left: ClassVar[bool] = False
    """True if the left factor may be that of several linears, so that none can change it alone."""
    has_fixed_price: ClassVar[bool] = True
    """True if every rank adds the same number of values."""
    timed_as: ClassVar[str] = ""
    """Form of a latency table whose times it takes; empty: its own."""

    @property
    def divided(self) -> Divided:
        """The parts of a linear that the size of a cut counts; `linears` if a cut has one size, so
        that a plan decides only which linears are cut."""
        if self.has_rank:
            return "ranks and entries together" if self.has_nonzeros else "ranks"
        return "entries" if self.has_nonzeros else "linears"

    @property
    def is_factored(self) -> bool:
        """True if the form is two factors and nothing else."""
        return self.has_rank and not self.has_nonzeros

    @abstractmethod
    def values(self, linear: Linear, cut: Cut) -> int:
        """Number of stored values of the weight; an index and the bias are not counted."""

    def operations(self, linear: Linear, cut: Cut) -> int:
        """Multiply-adds of one token. A linear multiplies by its basis even if others share it;
        entries are made a dense weight at every call, which is multiplied."""
        factors = self.factor_values(linear, cut.rank) if self.has_rank else 0
        if self.has_nonzeros:
            return linear.values + factors
        return factors if self.has_rank else self.values(linear, cut)

    def index_bytes(self, linear: Linear, cut: Cut) -> int:
        """Bytes of the index beside the values."""
        return 0

    def index_code(self, linear: Linear, cut: Cut) -> str:
        """Name of the code of the index; empty where there is none to choose."""
        return ""

    def least_values(self, linear: Linear) -> int:
        """Values of the smallest cut: rank 1, or the dense weight if that stores no more."""
        if self.break_even(linear) > 1:
            return self.factor_values(linear, 1)
        return linear.values

    def factor_values(self, linear: Linear, rank: Ranks) -> Ranks:
        """Number of values of factors of this rank, R (O + I)."""
        return rank * linear.rank_cost

    def break_even(self, linear: Linear) -> int:
        """Smallest rank whose factors save nothing, floor(O I / (O + I)).

        A linear that would get this rank or a larger one stays dense.
        """
        return linear.values // linear.rank_cost

    def rank_within(self, linear: Linear, values: int) -> int:
        """Largest rank whose factors store at most `values`, themselves at most the dense ones."""
        return values // linear.rank_cost
