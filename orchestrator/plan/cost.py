"""Costs that a budget limits: stored values, multiply-adds or cache of a token, measured seconds.

Costs are whole numbers, times in picoseconds, so that sums are exact and do not depend on their
order. The cost of factors does not fall as the rank grows. Operations and times of an expert that a
fraction K / E of the tokens is routed to are that fraction of those of all tokens, rounded up.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from orchestrator.plan.forms import DROPPED, FORMS, Form
from orchestrator.plan.forms.base import Ranks
from orchestrator.plan.latency_table import LatencyTable, LinearTimes
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

PICOSECONDS = 10**12
"""In a second."""


class Cost(ABC):
    """Cost of a linear, dense or as factors; a frozen value."""

    name: ClassVar[str]
    """Name of the cost in a report."""
    field: ClassVar[str]
    """Field of the recipe that limits it to a fraction."""
    has_fixed_part: ClassVar[bool] = False
    """True if the smallest rank costs more than as many further ones, as calls take time."""

    @abstractmethod
    def dense(self, linear: Linear) -> int:
        """Return the cost of the dense weight."""

    @abstractmethod
    def factors(self, linear: Linear, form: Form, rank: Ranks) -> Ranks:
        """Return the cost of factors of a rank, or of many."""

    @abstractmethod
    def of(self, linear: Linear, assignment: Assignment) -> int:
        """Return the cost of an assignment."""

    @abstractmethod
    def shown(self, cost: int) -> str:
        """Return a cost as text, with its unit."""


class ValueCost(Cost):
    """Stored values, without indices; linears of a group store their basis once."""

    name = "values"
    field = "keep"

    def dense(self, linear: Linear) -> int:
        return linear.values

    def factors(self, linear: Linear, form: Form, rank: Ranks) -> Ranks:
        return form.factor_values(linear, rank)

    def of(self, linear: Linear, assignment: Assignment) -> int:
        return assignment.stored_values(linear)

    def shown(self, cost: int) -> str:
        return f"{cost} values"


class OperationCost(Cost):
    """Multiply-adds of one token, as the modules of the forms compute: see `Form.operations`.

    Those of two factors, plain or pivoted, are as many as their values. Each of the linears that
    share a basis multiplies by it: they are in different blocks with different inputs, or experts,
    which are computed one by one. A sparse weight is multiplied as a dense one, and so are entries
    beside factors, in addition to them. An expert counts by the part of the tokens that it sees: if
    all see equally many, the sum is what the average token costs.
    """

    name = "operations"
    field = "keep_flops"

    def dense(self, linear: Linear) -> int:
        return _of_seen_tokens(linear, linear.values)

    def factors(self, linear: Linear, form: Form, rank: Ranks) -> Ranks:
        return _of_seen_tokens(linear, form.factor_values(linear, rank))

    def of(self, linear: Linear, assignment: Assignment) -> int:
        return _of_seen_tokens(linear, FORMS[assignment.form].operations(linear, assignment))

    def shown(self, cost: int) -> str:
        return f"{cost} multiply-adds a token"


class CacheCost(Cost):
    """Numbers that a cache stores of one token: outputs of keys and values, or their latents.

    Linears of low rank R count R, where `orchestrator.hf.latent_cache` stores latents, and others
    their outputs. A token's position, 4 bytes a block with latent keys, is left out: the dtype of
    the cache is not known here. Linears other than k_proj and v_proj have no cache, so that no
    factors of theirs cost less than dense, and they stay dense.
    """

    name = "cache"
    field = "keep_cache"

    def dense(self, linear: Linear) -> int:
        return linear.out_features if linear.is_cached else 0

    def factors(self, linear: Linear, form: Form, rank: Ranks) -> Ranks:
        return rank if linear.is_cached else 0 * rank

    def of(self, linear: Linear, assignment: Assignment) -> int:
        is_latent = FORMS[assignment.form].is_factored and linear.is_cached
        return assignment.rank if is_latent else self.dense(linear)

    def shown(self, cost: int) -> str:
        return f"{cost} cached numbers a token"


class TimeCost(Cost):
    """Measured time of a linear on the device of a table, in picoseconds, all its tokens together.

    The times of each shape and form are made not to fall with the rank (`isotonic`), so that noise
    makes no larger rank cheaper, and interpolated linearly between measured ranks. A rank below the
    smallest measured one takes its time. One above the largest is never faster than dense. The time
    of an expert is taken to be proportional to its tokens.

    Raises:
        InputError: From `dense` and `factors`: the table lacks the shape.
    """

    name = "time"
    field = "keep_latency"
    has_fixed_part = True

    def __init__(self, table: LatencyTable) -> None:
        self.table = table
        self._dense = {shape: picoseconds(each.dense) for shape, each in table.shapes.items()}
        self._forms = {shape: _monotone(each) for shape, each in table.shapes.items()}

    def dense(self, linear: Linear) -> int:
        return _of_seen_tokens(linear, self._dense_of_all(linear))

    def factors(self, linear: Linear, form: Form, rank: Ranks) -> Ranks:
        dense = self._dense_of_all(linear)
        forms = self._forms[linear.out_features, linear.in_features]
        ranks, times = forms.get(form.timed_as or form.name, NEVER)
        slow = max(dense, int(times.max(initial=0)))
        found = np.rint(np.interp(rank, ranks, times, right=slow))
        if isinstance(rank, np.ndarray):
            return _of_seen_tokens(linear, np.asarray(found, dtype=np.int64))
        return _of_seen_tokens(linear, int(found))

    def of(self, linear: Linear, assignment: Assignment) -> int:
        """Return the time of an assignment; a sparse weight is multiplied as a dense one.

        A dropped linear takes none.
        """
        form = FORMS[assignment.form]
        if form is DROPPED:
            return 0
        if not form.is_factored:
            return self.dense(linear)
        return self.factors(linear, form, assignment.rank)

    def _dense_of_all(self, linear: Linear) -> int:
        """Return the time of the dense weight if all tokens pass it."""
        self.table.times(linear)
        return self._dense[linear.out_features, linear.in_features]

    def shown(self, cost: int) -> str:
        return f"{1e6 * cost / PICOSECONDS:.1f} us"


VALUES = ValueCost()
"""Stored values, the cost that all allocators divide."""
OPERATIONS = OperationCost()
CACHE = CacheCost()
NEVER = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
"""Times of a form that was not measured: no rank is within them."""


def _of_seen_tokens(linear: Linear, cost: Ranks) -> Ranks:
    """Return the cost for the part of the tokens that a linear sees, rounded up."""
    part = linear.routed
    return cost if part == 1 else -(-cost * part.numerator // part.denominator)


def picoseconds(seconds: float) -> int:
    """Return a time as a whole number, at least 1."""
    return max(round(seconds * PICOSECONDS), 1)


def _monotone(times: LinearTimes) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: (ranks, np.maximum(np.rint(isotonic(seconds) * PICOSECONDS), 1).astype(np.int64))
        for name, (ranks, seconds) in times.forms.items()
    }


def isotonic(values: np.ndarray) -> np.ndarray:
    """Return the sequence that does not fall and is nearest to `values` by least squares.

    Adjacent values in the wrong order are replaced by their mean until there are none (pool of
    adjacent violators); a sequence that does not fall stays as it is. O(n).
    """
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        mean, count = value, 1
        while means and means[-1] > mean:
            before, others = means.pop(), counts.pop()
            mean = (mean * count + before * others) / (count + others)
            count += others
        means.append(mean)
        counts.append(count)
    return np.repeat(np.array(means), counts)


def first_slow(rows: Sequence[tuple[int, float]], dense: float) -> int | None:
    """Return the first measured rank that takes no less than `dense` seconds, after `isotonic`.

    Args:
        rows: Ranks, ascending, and their seconds.
    """
    times = isotonic(np.array([took for _, took in rows]))
    return next((rank for (rank, _), took in zip(rows, times, strict=True) if took >= dense), None)
