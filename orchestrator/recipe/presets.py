"""Presets: named recipes."""

from typing import Any

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
