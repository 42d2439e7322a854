"""Loading that takes nothing for granted."""

import os
from typing import Any

from transformers import AutoModelForCausalLM

from orchestrator.errors import InputError
from orchestrator.hf.quantizer import register


def load(directory: str | os.PathLike[str], **options: Any) -> Any:
    """The causal language model in a directory, compressed or dense, in eval mode.

    As `AutoModelForCausalLM.from_pretrained`, but where that warns of weights which the checkpoint
    lacks and makes them up, this stops.

    Args:
        options: What `from_pretrained` takes: `dtype`, `device_map`, ...

    Raises:
        InputError: The config does not fit, or weights are missing.
    """
    register()
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, **options, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{os.fspath(directory)}: {len(missing)} weights are not stored: "
            f"{', '.join(missing[:3])}; the checkpoint is damaged or of another model"
        )
    return model
