"""Ways to make the experts of a model smaller: fields of a recipe by the name of the row."""

from collections.abc import Mapping
from typing import Any

ROWS: Mapping[str, Mapping[str, Any]] = {
    "svd": {"method": "svd"},
    "svd-llm": {"method": "svd-llm"},
    "two-sided, uniform": {"method": "two-sided", "allocation": "uniform"},
    "two-sided": {"method": "two-sided"},
    "expert-sharing, uniform": {"method": "expert-sharing", "allocation": "uniform"},
    "expert-sharing": {"method": "expert-sharing"},
    "expert-sharing, refit": {
        "method": "expert-sharing",
        "options": {"expert-sharing": {"refit": "always"}},
    },
    "two-sided, drop": {
        "method": "two-sided",
        "options": {"threshold": {"drop": "reroute"}},
    },
    "two-sided, drop, zero": {
        "method": "two-sided",
        "options": {"threshold": {"drop": "zero"}},
    },
    "reap": {"method": "reap"},
    "reap, model": {"method": "reap", "options": {"reap": {"scope": "model"}}},
    "reap, zero": {"method": "reap", "options": {"reap": {"router": "zero"}}},
    "merge-experts": {"method": "merge-experts"},
}
"""All get the same kept fraction of the values of the experts."""
