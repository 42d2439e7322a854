"""Properties of methods that decide time and memory; a test compares them with the methods.

The methods themselves need torch, which a forecast does without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrator.allocate import ALLOCATORS
from orchestrator.allocate.cap import CapAllocator
from orchestrator.allocate.strs import Strs
from orchestrator.errors import UsageError
from orchestrator.plan.grouping import SHARED, Grouping, gram_side
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import check_choice, check_known, check_whole, option_names
from orchestrator.recipe.recipe import Recipe

Kind = Literal["low_rank", "two_sided", "two_sided_sparse", "rpca", "sparse"]
"""Kind of decomposition."""
_MASKED = ("iterations", "samples", "chunks")
FACTORS = ("low_rank", "two_sided")
"""Kinds whose result is exactly two factors."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Properties of one method with its options."""

    kind: Kind = "low_rank"
    allocation: str = "uniform"
    """The allocation of the recipe, or else of the method."""
    labels: int = 0
    """Backward passes of each sequence."""
    group: int = 1
    """Blocks whose linears share a basis."""
    refit: str = "never"
    """Condition of the refit of left factors: `never`, `above_forty` (% removed), `always`."""
    inputs_only: bool = False
    """True if every Gram is of inputs."""
    is_scaled: bool = False
    """True if factors are optimal in the method's own norm, given by scales of the inputs."""
    wide_curvature: bool = False
    """True if curvatures are always of the outputs, even if these are the wider side."""

    masked: int = 96
    """Sequences through masked models for a choice of masks: `cap`'s iterations by its samples by
    its chunks."""
    trials: int = 8
    """For each linear, sequences through models with one cut: `strs`' sizes times its windows."""

    @property
    def scores(self) -> Literal["", "masks", "sensitivities"]:
        """Losses that are taken after the decomposition."""
        if self.allocation == "cap":
            return "masks"
        return "sensitivities" if self.allocation == "strs" else ""

    def refits(self, kept: float) -> bool:
        """True if left factors are fitted again, in a pass through the cut model."""
        return self.refit == "always" or (self.refit == "above_forty" and kept <= 0.6)

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.group, SHARED if self.group > 1 else ())

    def stacked(self, linear: Linear) -> Linear:
        """The tall linear that is decomposed in its place and that of the others of its group."""
        if not self.grouping.joins(linear):
            return linear
        return replace(linear, out_features=self.group * linear.out_features)


NEEDS: Mapping[str, Needs] = {
    "svd": Needs(is_scaled=True),
    "asvd": Needs(allocation="strs", is_scaled=True),
    "svd-llm": Needs(),
    "svd-llm-v2": Needs(allocation="svd-llm-v2"),
    "basis-sharing": Needs(group=2, refit="above_forty"),
    "d-rank": Needs(allocation="d-rank"),
    "mgaa": Needs(allocation="mgaa"),
    "cap": Needs(kind="rpca", allocation="cap", inputs_only=True),
    "two-sided": Needs(kind="two_sided", allocation="threshold", labels=1),
    "two-sided-sparse": Needs(
        kind="two_sided_sparse",
        allocation="two-sided-sparse",
        labels=1,
        inputs_only=True,
        wide_curvature=True,
    ),
    "wanda": Needs(kind="sparse", inputs_only=True),
}
"""By method, with its options at their defaults."""


def needs_of(recipe: Recipe) -> Needs:
    """Properties of the method of a recipe.

    Raises:
        UsageError: There is no such method or allocation, the two do not go together with how
            factors are stored, or an option that counts here has a value that is not allowed.
    """
    method, options = recipe.method, recipe.options.get(recipe.method, {})
    # tables of options of stages are checked with the stages
    recipe.check_names(methods=NEEDS, allocations=ALLOCATORS, tables=recipe.options)
    needs = NEEDS[method]
    draws = options.get("draws", 1)
    needs = replace(
        needs,
        allocation=recipe.allocation or needs.allocation,
        labels=needs.labels and draws,
        group=options.get("group", needs.group),
        refit=options.get("refit", needs.refit),
        masked=_masked(recipe.options.get("cap", {})),
        trials=_trials(recipe.options.get("strs", {})),
    )
    check_whole(f"{method}: draws", draws, 1, 1000)
    check_whole(f"{method}: group", needs.group, 1, 1000)
    check_choice(f"{method}: refit", needs.refit, ("never", "above_forty", "always"))
    if recipe.storage == "pivoted" and (needs.kind not in FACTORS or needs.group > 1):
        raise UsageError(
            f"storage is 'pivoted', which is for two factors of one linear each; {method} "
            "keeps entries or shares bases; give storage 'plain'"
        )
    return needs


def _masked(options: Mapping[str, Any]) -> int:
    found = CapAllocator(**{name: options[name] for name in options if name in _MASKED})
    return found.iterations * found.samples * found.chunks


def _trials(options: Mapping[str, Any]) -> int:
    check_known("strs", options, option_names(Strs))
    found = Strs(**options)
    return len(found.grid.split()) * found.windows


def input_grams(linears: Sequence[Linear], needs: Needs) -> dict[str, int]:
    """Channels of the Grams of some blocks, by what they are of: a site, or a linear's outputs."""
    sizes: dict[str, int] = {}
    for linear in linears:
        site = [each for each in linears if each.site == linear.site]
        of_inputs = needs.inputs_only or needs.grouping.joins(linear)
        if of_inputs or gram_side(linear, site) == "input":
            sizes[linear.site] = linear.in_features
        else:
            sizes[f"{linear.name} output"] = linear.out_features
    return sizes


def gram_of(linear: Linear, sizes: Mapping[str, int]) -> str:
    """The Gram that a linear is decomposed with."""
    output = f"{linear.name} output"
    return output if output in sizes else linear.site


def curvatures(linears: Sequence[Linear], needs: Needs) -> dict[str, int]:
    """Channels of the second moments of gradients of some blocks, by the linear."""
    if not needs.labels:
        return {}
    return {each.name: curvature_channels(each, needs) for each in linears}


def curvature_channels(linear: Linear, needs: Needs) -> int:
    if needs.wide_curvature:
        return linear.out_features
    return min(linear.out_features, linear.in_features)
