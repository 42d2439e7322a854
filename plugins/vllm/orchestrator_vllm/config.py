"""Quantization method `orchestrator` of vLLM: the compressed linears of a model and their forms."""

from dataclasses import replace
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models.utils import WeightsMapper

from orchestrator_vllm.forms.base import StoredForm
from orchestrator_vllm.forms.config import METHOD
from orchestrator_vllm.forms.errors import InputError
from orchestrator_vllm.method import FactoredLinearMethod
from orchestrator_vllm.names import materialized, read_served, stored_names
from orchestrator_vllm.shards import Shard

logger = init_logger("vllm.orchestrator")


@register_quantization_config(METHOD)
class ServedConfig(QuantizationConfig):
    """The field `quantization_config` of config.json.

    Attributes:
        forms: Form of every compressed linear, by its name in vLLM's model.
        members: Linears that share a basis with the linear of a name, in the layers that exist.
    """

    def __init__(self, forms: dict[str, StoredForm]) -> None:
        super().__init__()
        self.forms = forms
        self.members: dict[str, list[Shard]] = {}
        self._claimed: set[str] = set()

    @property
    def bases(self) -> set[str]:
        """Names of the linears whose basis others use."""
        return {form.basis for form in self.forms.values()} - {""}

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
    def from_config(cls, config: dict[str, Any]) -> "ServedConfig":
        """Read the config before any weight is.

        Raises:
            InputError: As `read_served`.
        """
        forms = read_served(config)
        if names := materialized(forms):
            logger.info(
                "%d linears with stored entries (%s, ...) are multiplied out: they take the memory "
                "and the time of dense ones",
                len(names),
                names[0],
            )
        return cls(forms)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Change the names of linears, and those in their forms, to the names in vLLM's model."""
        # without the entries that would make `qkv_proj` of `q_proj`
        rename = hf_to_vllm_mapper.get_rename_mapper()

        def renamed(name: str) -> str:
            return (rename.map_name(name) or name) if name else ""

        self.forms = {
            renamed(name): replace(form, basis=renamed(form.basis))
            for name, form in self.forms.items()
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer; None for one that is dense by its kind.

        Raises:
            InputError: The config names a layer that this package cannot serve compressed.
        """
        names = stored_names(prefix, self.packed_modules_mapping)
        found = [name for name in names if name in self.forms]
        self._claimed |= set(found)
        if isinstance(layer, LinearBase):
            if not found:
                return UnquantizedLinearMethod()
            declared = prefix.rpartition(".")[2] in self.packed_modules_mapping
            if isinstance(layer, QKVParallelLinear) and len(names) == 1 and not declared:
                raise InputError(
                    f"{prefix}: the checkpoint has queries, keys and values in one linear, whose "
                    "rows vLLM puts in another order while loading; serve the dense export"
                )
            return FactoredLinearMethod(self, {name: self.forms.get(name) for name in names})
        if found:
            raise InputError(
                f"{prefix}: a {type(layer).__name__} cannot be compressed; serve the dense export"
            )
        return None

    def check_claimed(self) -> None:
        """Raise InputError if the config names a linear that no layer of the model has.

        A pipeline stage has a part of the layers, so this is checked for a single stage alone.
        """
        unknown = [name for name in self.forms if name not in self._claimed]
        if unknown and get_pp_group().world_size == 1:
            raise InputError(
                f"{unknown[0]}: vLLM's model has no such linear; the config is another model's, or "
                "vLLM joins linears that this version does not know; serve the dense export"
            )
