"""Plan of a run: the form, rank and entries of every targeted linear."""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from orchestrator.errors import InputError
from orchestrator.plan.forms import PIVOT_BYTES, Form, index_bytes
from orchestrator.plan.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one linear becomes."""

    form: Form
    rank: int = 0
    """Rank of the factors; 0 where the form has none."""
    nonzeros: int = 0
    """Stored entries of `sparse` and `low_rank_sparse`; 0 where the form has none."""
    basis: str = ""
    """Name of the `low_rank` linear whose `down` [R, I] this one uses; empty: it has its own."""

    def stored_values(self, linear: Linear) -> int:
        """The values of its weight: R O, R I unless the basis is another's, and the nonzeros.

        Pivoted factors store R^2 fewer.
        """
        if self.form == "dense":
            return linear.values
        own_down = 0 if self.basis else self.rank * linear.in_features
        outputs = linear.out_features - (self.rank if self.form == "pivoted" else 0)
        return self.rank * outputs + own_down + self.nonzeros

    def stored_bytes(self, linear: Linear, itemsize: int) -> int:
        """The bytes of its weight: `itemsize` a value, and the index.

        That is the smallest one of the nonzeros, or that of the pivots.
        """
        values_bytes = self.stored_values(linear) * itemsize
        if self.form == "pivoted":
            return values_bytes + PIVOT_BYTES * linear.out_features
        if not self.nonzeros:
            return values_bytes
        sizes = index_bytes(linear.out_features, linear.in_features, self.nonzeros)
        return values_bytes + min(sizes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every targeted linear becomes; linears that are not named are not targeted."""

    assignments: Mapping[str, Assignment]
    budget_values: int
    """The values that the targeted linears may store together."""
    stored_values: int
    """The values that they do store; never above the budget."""

    @property
    def slack_values(self) -> int:
        return self.budget_values - self.stored_values

    def to_json(self) -> dict[str, Any]:
        return {
            "assignments": {name: asdict(a) for name, a in self.assignments.items()},
            "budget_values": self.budget_values,
            "stored_values": self.stored_values,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Raises InputError where it is not what `to_json` gives."""
        try:
            assignments = {name: Assignment(**a) for name, a in value["assignments"].items()}
            plan = cls(**{**value, "assignments": assignments})
        except (AttributeError, KeyError, TypeError) as error:
            said = repr(str(error)[:200])
            raise InputError(f"plan: a field is missing or unknown: {said}") from error
        counts = [plan.budget_values, plan.stored_values]
        for name, each in assignments.items():
            counts += [each.rank, each.nonzeros]
            is_named = isinstance(name, str) and isinstance(each.basis, str)
            if not is_named or each.form not in get_args(Form):
                raise InputError(f"plan: no linear can be {reprlib.repr(each)}")
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise InputError("plan: a rank, nonzeros or values are no whole numbers, 0 or above")
        return plan
