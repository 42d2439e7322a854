"""Plan of a run: the form, rank and entries of every targeted linear."""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.plan.codecs import Codec
from orchestrator.plan.forms import FORMS
from orchestrator.plan.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Form and size of one linear."""

    form: str
    """Name of the form, a key of `FORMS`."""
    rank: int = 0
    """Rank of the factors; 0 where the form has none."""
    nonzeros: int = 0
    """Stored entries of `sparse` and `low_rank_sparse`; 0 where the form has none."""
    basis: str = ""
    """Name of the linear of this form whose basis this one uses, `down` [R, I] of `low_rank`,
    `weight` [O, R] of `output_basis` or [O, I] of `tied`; empty: it has its own."""

    def stored_values(self, linear: Linear) -> int:
        """Number of values of its weight; an index is not counted."""
        return FORMS[self.form].values(linear, self)

    def stored_bytes(self, linear: Linear, codec: Codec) -> int:
        """Bytes of its weight: values in this number format, and the index."""
        form = FORMS[self.form]
        return codec.bytes(form.values(linear, self)) + form.index_bytes(linear, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Assignment of every targeted linear, by name; a linear without one is not targeted."""

    assignments: Mapping[str, Assignment]
    budget_values: int
    """Number of values that the targeted linears may store together."""
    stored_values: int
    """Number of values that they store, at most the budget."""
    reroutes: bool = False
    """True if routers lose the rows of dropped experts, and choose among the others."""

    @property
    def slack_values(self) -> int:
        return self.budget_values - self.stored_values

    @property
    def forms(self) -> frozenset[str]:
        """Names of the forms in use."""
        return frozenset(each.form for each in self.assignments.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "assignments": {name: asdict(a) for name, a in self.assignments.items()},
            "budget_values": self.budget_values,
            "stored_values": self.stored_values,
            **({"reroutes": True} if self.reroutes else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Read the result of `to_json`; raises InputError if it is not one."""
        try:
            assignments = {name: Assignment(**a) for name, a in value["assignments"].items()}
            plan = cls(**{**value, "assignments": assignments})
        except (AttributeError, KeyError, TypeError) as error:
            said = repr(str(error)[:200])
            raise InputError(f"plan: a field is missing or unknown: {said}") from error
        counts = [plan.budget_values, plan.stored_values]
        for name, each in assignments.items():
            counts += [each.rank, each.nonzeros]
            are_names = all(isinstance(text, str) for text in (name, each.form, each.basis))
            if not are_names or each.form not in FORMS:
                raise InputError(f"plan: no linear can be {reprlib.repr(each)}")
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise InputError("plan: a rank, nonzeros or values are no whole numbers, 0 or above")
        return plan
