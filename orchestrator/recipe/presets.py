"""Presets: named recipes."""

from collections.abc import Mapping
from typing import Any

from orchestrator.recipe.values import check_options

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "two-sided", "storage": "pivoted", "rank_multiple": "auto"},
    "best": {
        "method": "two-sided",
        "storage": "pivoted",
        "rank_multiple": "auto",
        "refine": "blocks",
        "train": "all",
        "options": {
            "refinement": {"epochs": 10, "learning_rate": 3e-4},
            "training": {"epochs": 4, "learning_rate": 4e-5},
        },
    },
}
"""Named recipes. `fast` is the best closed form: no weight is trained. `best` also refines its
blocks independently, then trains the whole model."""
DEFAULT_PRESET = "fast"
"""Preset of a recipe that names no method."""
ASKED_BY = {"refinement": "refine", "training": "train"}
"""Field of a recipe that asks for the stages whose options are in a table of a preset."""


def over_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a preset with given fields, which win; tables by option, none of a stage turned off."""
    preset = PRESETS[name]
    check_options(given.get("options", {}))
    options = {
        table: dict(known)
        for table, known in preset.get("options", {}).items()
        if given.get(ASKED_BY[table]) != "none"
    }
    for table, known in given.get("options", {}).items():
        options[table] = {**options.get(table, {}), **known}
    return {**preset, **given, "options": options}
