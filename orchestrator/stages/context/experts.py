"""Tokens of experts in calibration: facts of the units of decompositions, report and warnings."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.plan.linear import Linear

FEW_TOKENS = 10
"""Number of tokens below which statistics are little more than the mean of the block."""


def expert_tokens(facts: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
    """Return the calibration tokens of every expert, by the name of its module, in model order.

    Args:
        facts: Facts of the units of decompositions, by block.
    """
    return {
        name: tokens
        for _, each in sorted(facts.items())
        for name, tokens in each.get("expert_tokens", {}).items()
    }


def expert_warnings(
    tokens: Mapping[str, int], linears: Sequence[Linear], *, as_wholes: bool = False
) -> list[str]:
    """Return sentences about experts with few calibration tokens.

    With fewer tokens than channels a second moment is singular; such experts get tokens of the mean
    over their block in addition (`models.statistics.routed`).

    Args:
        linears: The targeted linears.
        as_wholes: True if experts are measured as wholes, without second moments.
    """
    channels: dict[str, int] = {}
    for linear in linears:
        name = linear.name.rpartition(".")[0]
        if name in tokens:
            channels[name] = max(channels.get(name, 0), linear.in_features)
    warnings = []
    few = [name for name, count in tokens.items() if count < FEW_TOKENS]
    if few:
        fewest = min(few, key=lambda name: tokens[name])
        poor = "measurements are poor" if as_wholes else "factors follow the mean of the block"
        warnings.append(
            f"{len(few)} of {len(tokens)} experts have fewer than {FEW_TOKENS} calibration tokens "
            f"({fewest} has {tokens[fewest]}); their {poor}: give more text, or text that uses them"
        )
    short = [name for name, count in tokens.items() if count < channels.get(name, 0)]
    if short and not as_wholes:
        warnings.append(
            f"{len(short)} of {len(tokens)} experts have fewer calibration tokens than inputs; "
            "statistics of these are poor: give more text"
        )
    return warnings
