"""Checks of a model's config.json that need neither torch nor transformers."""

import math
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.headers import legible, quoted
from orchestrator.store.places import Place

FORMS_KEYS = ("quantization_config", "compression_config")
"""Config fields that describe weights stored in another form than the class defines."""
ELSEWHERE_KEYS = ("configuration_files", "transformers_weights")
"""Config fields that name files to read instead of the usual ones."""
MAX_REPEATS = 10_000
"""Limit of counts (blocks, labels) for which transformers builds lists while it reads a config."""
LARGEST_FLOAT = 3.4028234663852886e38
"""Largest number of float32; a larger one becomes infinite in a forward pass."""
_REPEATS = re.compile(r"(^|_)(n_?)?(layers?|labels|types)$")


def check_config(path: Place, content: Mapping[str, Any]) -> None:
    """Check the values of a config that any class would take without a word.

    Raises:
        InputError: It names other files, has an implausible count, or a number that is not finite.
    """
    for key in ELSEWHERE_KEYS:
        if key in content:
            raise InputError(
                f"{path}: {key} names other files; only the usual names are read, rename the files"
            )
    _check_values(path, "", content)


def check_not_quantised(path: Place, content: Mapping[str, Any], *, ours: str = "") -> None:
    """Raise InputError if another program than `ours` has changed the form of the weights."""
    for key in FORMS_KEYS:
        forms = content.get(key)
        method = forms.get("quant_method") if isinstance(forms, dict) else None
        if forms is not None and (not ours or method != ours):
            raise InputError(
                f"{path}: already quantised ({key}.quant_method is {quoted(method)}); "
                "a dense checkpoint is needed"
            )


def _check_values(path: Place, key: str, value: Any) -> None:
    """Raise InputError for an implausible number of blocks or labels, NaN and infinity."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else [(key, each) for each in value]
        for name, each in inner:
            _check_values(path, name, each)
    elif isinstance(value, int) and value > MAX_REPEATS and _REPEATS.search(key):
        raise InputError(f"{path}: {key} is {value}; the limit is {MAX_REPEATS}")
    elif isinstance(value, float) and not _is_allowed(key, value):
        raise InputError(f"{path}: {legible(key)} is {value}; it must be a finite number")


def _is_allowed(key: str, value: float) -> bool:
    """Test if a number is finite in float32; a limit, as of time steps, may also be infinite."""
    return abs(value) <= LARGEST_FLOAT or (key.endswith("_limit") and not math.isnan(value))
