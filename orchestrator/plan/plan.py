"""Plain values that cross process boundaries: what there is, what it costs, what becomes of it.

`Survey` describes a checkpoint, `Curve` says what truncating one linear loses, `Plan` says what
every linear becomes. All are immutable, and go to JSON and back unchanged.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from orchestrator.errors import InputError

Form = Literal["dense", "low_rank", "pivoted", "sparse", "low_rank_sparse"]
IndexCode = Literal["bitmask", "columns", "positions"]
"""How a sparse weight stores where its values stand."""
FACTORED: frozenset[Form] = frozenset({"low_rank", "pivoted"})
"""The forms that are two factors and nothing else."""
PIVOT_BYTES = 4
"""Of an output's place among the pivots and the others, a whole number."""

Ranks = TypeVar("Ranks", int, np.ndarray)
"""One rank or many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One weight matrix of a block that may be compressed."""

    name: str
    """Module name in the model, `model.layers.3.mlp.down_proj`."""
    block: int
    """Index of its block, counted from 0."""
    role: str
    """Its name within the block, `mlp.down_proj`: the same in every block of the model."""
    site: str
    """Name of the first linear, in call order, that reads the same input; q, k and v share one."""
    out_features: int
    in_features: int
    has_bias: bool
    norm: str = ""
    """Module name of the norm that its input comes from; empty where it comes from no module."""
    pivoted: bool = False
    """Whether its factors are to be stored as `pivoted` and not as `low_rank`."""

    @property
    def factored(self) -> Form:
        """The form that factors of it take."""
        return "pivoted" if self.pivoted else "low_rank"

    @property
    def sublayer(self) -> str:
        """The part of its block that it belongs to, `3.self_attn`, or `3.` if it has no parent."""
        return f"{self.block}.{self.role.rpartition('.')[0]}"

    @property
    def values(self) -> int:
        """Values of the dense weight; the bias is neither compressed nor counted."""
        return self.out_features * self.in_features

    @property
    def rank_cost(self) -> int:
        """Stored values of one rank, but for what pivoting saves."""
        return self.out_features + self.in_features

    @property
    def break_even(self) -> int:
        """The rank from which on factors save nothing: floor(m n / (m + n)), pivoted min(m, n).

        A linear that would get this rank or a larger one stays dense.
        """
        if self.pivoted:
            return min(self.out_features, self.in_features)
        return self.values // self.rank_cost

    def factor_values(self, rank: Ranks) -> Ranks:
        """Values that factors of this rank store: r (m + n), pivoted r (m + n) - r^2."""
        saved = rank * rank if self.pivoted else 0
        return rank * self.rank_cost - saved

    def rank_within(self, values: int) -> int:
        """The largest rank whose factors store no more than these values, at most the dense ones.

        Pivoted: (m + n - 2 r)^2 is then at least (m + n)^2 - 4 values.
        """
        if not self.pivoted:
            return values // self.rank_cost
        least = self.rank_cost**2 - 4 * values
        root = math.isqrt(least - 1) + 1 if least > 0 else 0
        return (self.rank_cost - root) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a checkpoint holds, from its config and tensor headers alone."""

    fingerprint: str
    """Hash of config and tensor index (names, shapes, dtypes, file sizes): the model's identity."""
    architecture: str
    """Class name of the model, `LlamaForCausalLM`."""
    model_type: str
    dtype: str
    """Dtype of the weights on disk, `bfloat16`."""
    num_blocks: int
    linears: tuple[Linear, ...]
    """Every linear of every block, in block order and, within a block, in call order."""
    total_parameters: int
    """Distinct parameters of the whole model; tied ones count once."""

    def of_block(self, block: int) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.linears if linear.block == block)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Survey":
        linears = tuple(Linear(**linear) for linear in value["linears"])
        return cls(**{**value, "linears": linears})


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What truncating one linear to rank r loses: `total - sum(energies[:r])`.

    `energies` are the squared singular values of the weight in the method's norm, descending,
    float64, at least up to the break-even rank; `total` is the sum of all of them. Of a sparse form
    they are of equal parts of the entries, in the order in which they are kept, and r counts parts.
    """

    name: str
    energies: np.ndarray
    total: float
    sensitivities: Mapping[int, float] = field(default_factory=dict)
    """By rank, the model's mean cross-entropy where this linear alone is cut to it; at the ranks
    where an allocation has asked for it. Measured apart, and no part of the JSON."""

    def loss(self, rank: int) -> float:
        """Squared error, in the method's norm, of the best approximation of this rank."""
        return max(self.total - float(self.energies[:rank].sum()), 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "energies": self.energies.tolist(), "total": self.total}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Curve":
        """Raises InputError where it is not what `to_json` gives."""
        try:
            energies = np.asarray(value["energies"], dtype=np.float64)
            curve = cls(name=str(value["name"]), energies=energies, total=float(value["total"]))
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            said = repr(str(error)[:200])
            raise InputError(f"curve: a field is missing or no number: {said}") from error
        if energies.ndim != 1:
            raise InputError(f"curve: energies have {energies.ndim} dimensions, one is needed")
        return curve


def index_bytes(out_features: int, in_features: int, nonzeros: int) -> dict[IndexCode, int]:
    """Bytes of the index of N values in an [O, I] weight, in every code that can hold it.

    `bitmask`: one bit an element, ceil(O I / 8). `columns`: column numbers of 16 bits and O + 1 row
    pointers of 32, 2 N + 4 (O + 1); up to 65536 columns. `positions`: flat, of 32 bits, 4 N; up to
    2^31 elements.
    """
    elements = out_features * in_features
    sizes: dict[IndexCode, int] = {"bitmask": (elements + 7) // 8}
    if in_features <= 2**16 and nonzeros < 2**31:
        sizes["columns"] = 2 * nonzeros + 4 * (out_features + 1)
    if elements <= 2**31:
        sizes["positions"] = 4 * nonzeros
    return sizes


def index_code(out_features: int, in_features: int, nonzeros: int) -> IndexCode:
    """The smallest code; of equal ones the first in the order bitmask, columns, positions."""
    sizes = index_bytes(out_features, in_features, nonzeros)
    return min(sizes, key=lambda code: sizes[code])


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
