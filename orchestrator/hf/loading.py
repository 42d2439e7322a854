"""Loading of a checkpoint after its config and headers have been checked."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from orchestrator.errors import InputError, OrchestratorError
from orchestrator.hf.quantizer import register
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.survey.architecture import Architecture, brief
from orchestrator.models.survey.expert_weights import view_experts
from orchestrator.models.survey.names import map_names

ADAPTER_FILE = "adapter_config.json"
SAFE = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
"""Defaults against network access, execution of code and unpickling; `options` override them."""


def load(directory: str | os.PathLike[str], **options: Any) -> Any:
    """The causal language model in a directory, compressed or dense, in eval mode.

    As `AutoModelForCausalLM.from_pretrained`, but where that warns of weights which the checkpoint
    lacks and makes them up, this stops. Of the directory only safetensors and JSON are read, and
    only when config and headers have been found sound; no code in it is run.

    Args:
        options: What `from_pretrained` takes: `dtype`, `device_map`, ...

    Raises:
        InputError: The directory is damaged, the config does not fit, weights are missing, or
            transformers does not load it for another reason.
    """
    register()
    place = Path(directory)
    weights = Weights.open(place)
    architecture = Architecture.read(place)
    if (place / ADAPTER_FILE).exists():
        raise InputError(
            f"{place}: {ADAPTER_FILE} has transformers add an adapter, from a pickle perhaps; "
            "move it out, load the model, then the adapter"
        )
    attention = str(architecture.config._attn_implementation)
    if "/" in attention and "attn_implementation" not in options:
        raise InputError(
            f"{place}: config.json asks for the kernel {attention} of a hub, which is code; "
            "give attn_implementation"
        )
    # sizes and shapes are found sound before anything is allocated
    model = architecture.build(torch.float32, stored=len(weights.names))
    if architecture.forms is not None:
        map_names(model, view_experts(weights, architecture))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, **(SAFE | options), output_loading_info=True
        )
    except (OrchestratorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers makes of foreign values
        raise InputError(f"{place}: cannot be loaded: {brief(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{place}: {len(missing)} weights are not stored: "
            f"{', '.join(missing[:3])}; the checkpoint is damaged or of another model"
        )
    return model
