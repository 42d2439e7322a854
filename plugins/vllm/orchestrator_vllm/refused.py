"""The quantization method under a release of vLLM that this package is not written for.

An error here would end processes that serve other models, so the sentence comes with the first
compressed checkpoint, before a weight is read.
"""

from typing import Any

import torch
import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from orchestrator_vllm.forms.config import METHOD
from orchestrator_vllm.forms.errors import InputError
from orchestrator_vllm.release import refusal


@register_quantization_config(METHOD)
class RefusedConfig(QuantizationConfig):
    """Config that is never made."""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RefusedConfig":
        """Raises: InputError: always."""
        raise InputError(refusal(vllm.__version__))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        return None
