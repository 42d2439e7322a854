"""What methods ask of a calibration, as far as time and memory go; held to them by a test.

The methods themselves need torch, which a forecast does without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import UsageError
from orchestrator.groups import gram_side
from orchestrator.plan import Linear

Kind = Literal["low_rank", "two_sided", "two_sided_sparse", "rpca", "sparse"]
"""How a weight is decomposed."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one method, with its options at their defaults."""

    kind: Kind = "low_rank"
    labels: int = 0
    """Passes backward for each sequence."""
    inputs_only: bool = False
    """Whether every Gram is of inputs."""
    wide_curvature: bool = False
    """Whether curvatures are of the outputs where these are the wider side too."""
    scores: Literal["", "masks", "sensitivities"] = ""
    """Passes through the model behind the decomposition."""


NEEDS: Mapping[str, Needs] = {
    "svd": Needs(),
    "asvd": Needs(scores="sensitivities"),
    "svd-llm": Needs(),
    "svd-llm-v2": Needs(),
    "basis-sharing": Needs(),
    "d-rank": Needs(),
    "mgaa": Needs(),
    "cap": Needs(kind="rpca", inputs_only=True, scores="masks"),
    "two-sided": Needs(kind="two_sided", labels=1),
    "two-sided-sparse": Needs(
        kind="two_sided_sparse", labels=1, inputs_only=True, wide_curvature=True
    ),
    "wanda": Needs(kind="sparse", inputs_only=True),
}


def needs_of(method: str) -> Needs:
    """Raises UsageError where there is no such method."""
    if method not in NEEDS:
        raise UsageError(f"method is {method!r}; it must be one of {', '.join(NEEDS)}")
    return NEEDS[method]


def input_grams(linears: Sequence[Linear], needs: Needs) -> dict[str, int]:
    """Channels of the Grams of some blocks, by what they are of: a site, or a linear's outputs."""
    sizes: dict[str, int] = {}
    for linear in linears:
        site = [each for each in linears if each.site == linear.site]
        if needs.inputs_only or gram_side(linear, site) == "input":
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
