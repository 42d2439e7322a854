"""Keys of the units that do not depend on the plan: one pure function.

A key names a unit by everything that decides its bytes, so equal keys mean equal content.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.stages.context.values import HeldOut, Keyed, Surveyed, extended
from orchestrator.store.units import unit_key

CALIBRATE_VERSION = 2
"""Raised when the input of the statistics changes."""
CURVATURE_VERSION = 1
"""Raised when a gradient changes, or a statistic that is gathered with it."""
WRITE_VERSION = 2
"""Raised when the bytes of a written file change, or its facts."""


def assign_keys(
    surveyed: Surveyed,
    tokens_key: str,
    token_report: Mapping[str, Any],
    held_out: HeldOut | None = None,
) -> Keyed:
    """Keys of passes, decompositions and result, from the model, the tokens and the recipe.

    The recipe gets the number and the length of the sequences, where it gives none.
    """
    recipe, method = surveyed.recipe, surveyed.method
    recipe = recipe.with_sequences(token_report["sequences"], token_report["sequence_length"])
    surveyed = replace(surveyed, recipe=recipe)
    inputs = [surveyed.survey.fingerprint, tokens_key]
    pass_key = unit_key("calibrate", CALIBRATE_VERSION, inputs, dtype=str(surveyed.dtype))
    statistics_key = pass_key
    if surveyed.needs_gradients:
        labels: dict[str, Any] = {"labels": method.label_draws, "seed": surveyed.randomness.seed}
        if method.labels != "drawn":
            labels = {"labels": method.labels}
        statistics_key = unit_key("curvature", CURVATURE_VERSION, [pass_key], **labels)
    block_keys = _block_keys(surveyed, statistics_key)
    decisive = {"recipe": recipe.to_toml(schedule=False)}
    if (table := surveyed.latency_table) is not None:
        decisive["latency_table"] = table.digest
    if held_out is not None:
        decisive["held_out"] = held_out.key
    return extended(
        surveyed,
        Keyed,
        tokens_key=tokens_key,
        token_report=token_report,
        pass_key=pass_key,
        statistics_key=statistics_key,
        block_keys=block_keys,
        held_out=held_out,
        key=unit_key("compress", WRITE_VERSION, [*block_keys.values()], **decisive),
    )


def _block_keys(surveyed: Surveyed, statistics_key: str) -> dict[int, str]:
    """Keys of the units of decompositions, by the first block of each group of blocks."""
    grouping, keys = surveyed.grouping, {}
    for block in range(0, surveyed.survey.num_blocks, grouping.size):
        linears = [each for each in surveyed.linears if grouping.first(each.block) == block]
        if linears:
            keys[block] = unit_key(
                "decompose",
                surveyed.method.version,
                [statistics_key],
                decomposition=surveyed.method.decomposition,
                linears=[[each.name for each in g] for g in grouping.groups(linears)],
                output_dtype=surveyed.recipe.output_dtype,
                **({"ranks": "all"} if surveyed.is_pivoted else {}),
                **({"cosines": "blocks"} if surveyed.block_cosines else {}),
            )
    return keys
