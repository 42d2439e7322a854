"""Plain values that cross process boundaries: what there is, what it costs, what becomes of it.

`Survey` describes a checkpoint, `Curve` says what truncating one linear loses, `Plan` says what
every linear becomes. All are immutable, and go to JSON and back unchanged.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Form = Literal["dense", "low_rank"]


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
        """Stored values of one rank."""
        return self.out_features + self.in_features

    @property
    def break_even(self) -> int:
        """The rank from which on factors save nothing: floor(m n / (m + n)).

        A linear that would get this rank or a larger one stays dense.
        """
        return self.values // self.rank_cost


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
    float64, at least up to the break-even rank; `total` is the sum of all of them.
    """

    name: str
    energies: np.ndarray
    total: float

    def loss(self, rank: int) -> float:
        """Squared error, in the method's norm, of the best approximation of this rank."""
        return max(self.total - float(self.energies[:rank].sum()), 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "energies": self.energies.tolist(), "total": self.total}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Curve":
        energies = np.asarray(value["energies"], dtype=np.float64)
        return cls(name=value["name"], energies=energies, total=value["total"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one linear becomes."""

    form: Form
    rank: int = 0
    """Rank of the factors; 0 where the form has none."""

    def stored_values(self, linear: Linear) -> int:
        return linear.values if self.form == "dense" else self.rank * linear.rank_cost


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
        assignments = {name: Assignment(**a) for name, a in value["assignments"].items()}
        return cls(**{**value, "assignments": assignments})
