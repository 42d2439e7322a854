"""Values of a compression: plain data, frozen, each made by one function from the one before.

    Asked       `request.ask`: resolved recipe and places; nothing has been read
    Surveyed    `survey.survey`: linears, dtype and fingerprint; headers have been read
    Keyed       `keys.assign_keys`: keys of all units that do not depend on the plan
    Decomposed  `decompose.calibrate_and_decompose`: facts of every decomposition
    Planned     `allocate.allocate`: the plan, and the curves or scores that it follows from

Each has the fields of those before it, so a stage takes the earliest one that suffices. They hold
names, curves and keys; weights, statistics and factors are in the workers alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import torch

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget
from orchestrator.forecast.outcome import Forecast
from orchestrator.methods.base import Method
from orchestrator.models.checkpoint.stored_tensor import StoredTensor
from orchestrator.plan.codecs import CODECS, Codec
from orchestrator.plan.forms import Form
from orchestrator.plan.grouping import Grouping
from orchestrator.plan.latency_table import LatencyTable
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Plan
from orchestrator.randomness import Randomness
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.context.previous_run import PreviousRun
from orchestrator.stages.context.worker.orders import DirectionScores
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A resolved recipe and the places of its files."""

    recipe: Recipe
    """With a method and a storage, and the allocation that the method implies, if none was
    named."""
    description: Mapping[str, Any]
    """Recipe as it was given, model and output, for the run directory."""
    method: Method
    allocator: Allocator
    budget: Budget
    latency_table: LatencyTable | None
    """Measured times of linears, for the budget or for the forecast of its speed."""
    model: Place
    base_model: str
    """Name of the model in the result: a hub id, or the name of its directory."""
    out: Place
    run: RunDirectory
    previous: PreviousRun | None
    """The run whose calibration text is used again."""

    @property
    def grouping(self) -> Grouping:
        """Linears that share a basis."""
        return self.method.grouping

    @property
    def form(self) -> Form:
        """Form of the linears that are cut."""
        return self.budget.form

    @property
    def is_pivoted(self) -> bool:
        """True if factors are pivoted after they are cut."""
        return self.recipe.storage == "pivoted"

    @property
    def randomness(self) -> Randomness:
        """Source of all random numbers."""
        return Randomness(seed=self.recipe.seed)

    @property
    def needs_gradients(self) -> bool:
        """True if the statistics need gradients of the loss, from backward passes."""
        return self.method.label_draws > 0

    @property
    def block_cosines(self) -> bool:
        """True if the cosine of every block's input and output is computed."""
        return self.method.block_cosines or self.allocator.needs_block_cosines


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed(Asked):
    """Blocks, linears and tensors of the model, from its config and headers."""

    survey: Survey
    linears: tuple[Linear, ...]
    """The targeted linears."""
    dtype: torch.dtype
    """Dtype of the forward passes."""
    vocabulary: int
    positions: int | None
    """Tokens of the longest sequence that the model's config allows; None: not said."""
    tensors: tuple[StoredTensor, ...]
    """Every tensor of the checkpoint, in the order of the model."""
    image_token: int | None
    """Token that stands for a part of an image; None for a model of text."""

    @property
    def codec(self) -> Codec:
        """Number format of written values."""
        asked = self.recipe.output_dtype
        return CODECS[self.survey.dtype if asked == "auto" else asked]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Committed tokens of the text on which an allocator compares plans."""

    key: str
    """Key of their unit."""
    report: Mapping[str, Any]
    """Facts of that unit."""

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        sequences: int = self.report["sequences"]
        return sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyed(Surveyed):
    """Keys of the calibration's units, of the decompositions and of the result."""

    tokens_key: str
    token_report: Mapping[str, Any]
    """Facts of the unit of tokens: `sequences`, `sequence_length` and their source."""
    pass_key: str
    """Key of the forward pass of all sequences."""
    statistics_key: str
    """Key of the pass that leaves the statistics: `pass_key` unless gradients are needed."""
    block_keys: Mapping[int, str]
    """Keys of the units of decompositions, by the first block of each group of blocks; blocks
    without targeted linears have none."""
    key: str
    """Key of the result: everything that decides its bytes, except the environment."""
    held_out: HeldOut | None = None
    """Text on which plans are compared; None if the allocator compares none."""

    @property
    def orders(self) -> Mapping[int, str]:
        """See `Scores`; empty before there is a plan."""
        return {}

    @property
    def gains(self) -> Mapping[int, str]:
        """See `Scores`; empty before there is a plan."""
        return {}

    @property
    def sequences(self) -> int:
        """Number of calibration sequences."""
        sequences: int = self.token_report["sequences"]
        return sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed(Keyed):
    """Facts of the decompositions, and the forecast by which the model was cut into shards."""

    forecast: Forecast | None
    """None if the headers do not suffice for one."""
    facts: Mapping[int, Mapping[str, Any]]
    """Facts of the units, by the first block of each group of blocks."""
    results: Mapping[str, Mapping[str, Any]]
    """Facts of every decomposition, by the name of its first linear."""


class Dividing(NamedTuple):
    """Inputs of an allocator beside the budget, and the way from its plans to those of the model.

    Linears that share a basis are one joint linear, under the name of the first.
    """

    linears: Sequence[Linear]
    curves: Mapping[str, Any]
    cosines: Mapping[str, float]
    filled: Callable[[Callable[[Budget], Plan]], Plan]
    """Returns the plan of all linears that fills the budget, of whatever cost, by a function that
    divides values over the joint ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Losses that the allocator has asked for, and what was chosen by them."""

    report: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the report."""
    losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Sensitivities: mean cross-entropy by linear (the first of a group) and by the rank that it
    alone is cut to."""
    plan: Plan | None = None
    """The plan, if losses of masked models, or of whole plans, decide it."""
    choice: tuple[str, ...] = ()
    """Key of the unit with the candidates that are kept; empty if factors are cut to a prefix."""
    learned: Mapping[str, DirectionScores] = field(default_factory=dict)
    """Learned scores of the directions, by linear."""
    orders: Mapping[int, str] = field(default_factory=dict)
    """Keys of the units of learned scores, by block; empty if factors are cut to a prefix of the
    stored directions."""
    gains: Mapping[int, str] = field(default_factory=dict)
    """Keys of the units of gains by which kept directions are multiplied, by block; those of the
    scores if the gates are the gains; empty if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Decomposed):
    """The plan, with the curves and scores that it follows from."""

    plan: Plan
    curves: Mapping[str, Any]
    """Curves of the method's kind of result, by linear; empty if losses of masks decided."""
    scores: Scores
    multiples: Mapping[str, Any]
    """Numbers of which ranks are multiples, and their cost; empty if every rank is allowed."""
    costs: Mapping[str, Any]
    """Operations, time and predicted loss of the plan; empty for a budget of values or bytes
    without a table of times."""

    @property
    def choice(self) -> tuple[str, ...]:
        """See `Scores`."""
        return self.scores.choice

    @property
    def orders(self) -> Mapping[int, str]:
        return self.scores.orders

    @property
    def gains(self) -> Mapping[int, str]:
        return self.scores.gains

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """Keys of the units that say which parts a plan keeps, where a size does not."""
        orders, gains = self.scores.orders, self.scores.gains
        of_gains = ("gains",) if gains and gains == orders else tuple(gains.values())
        return (*self.scores.choice, *orders.values(), *of_gains)


def extended(value: Any, to: type[Value], **more: Any) -> Value:
    """The next value: all fields of this one, and those that it adds."""
    return to(**{each.name: getattr(value, each.name) for each in fields(value)}, **more)
