"""Quantization method `orchestrator` of SGLang: the compressed linears of a model, their forms."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sglang
import torch
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.models.utils import WeightsMapper
from sglang.srt.runtime_context import get_parallel

from orchestrator_sglang.method import FactoredLinearMethod
from orchestrator_sglang.release import refusal
from orchestrator_sglang.shared.forms.base import StoredForm
from orchestrator_sglang.shared.forms.config import METHOD, read_forms
from orchestrator_sglang.shared.forms.errors import InputError
from orchestrator_sglang.shared.names import check_bases, materialized, stored_names
from orchestrator_sglang.shared.shards import Shard

logger = logging.getLogger(__name__)

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Linears in layers of these names; most models of SGLang do not declare them."""
ADDED = ("packed_modules_mapping", "hf_config")
"""Fields that SGLang adds to the config."""


class NamedConfig(QuantizationConfig):
    """Answers that do not depend on the checkpoint."""

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

    def get_scaled_act_names(self) -> list[str]:
        return []


class RefusedConfig(NamedConfig):
    """Config under a release of SGLang that this package is not written for; never made."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RefusedConfig":
        """Raises: InputError: always."""
        raise InputError(refusal(sglang.__version__))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        return None


class ServedConfig(NamedConfig):
    """The field `quantization_config` of config.json.

    Attributes:
        forms: Form of every compressed linear, by its name in SGLang's model.
        members: Linears that share a basis with the linear of a name, in the layers that exist.
    """

    def __init__(self, forms: dict[str, StoredForm], packed: dict[str, list[str]]) -> None:
        super().__init__()
        self.forms = forms
        self.packed_modules_mapping = PACKED | packed
        self.members: dict[str, list[Shard]] = {}
        self._claimed: set[str] = set()

    @property
    def bases(self) -> set[str]:
        """Names of the linears whose basis others use."""
        return {form.basis for form in self.forms.values()} - {""}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedConfig":
        """Read the config before any weight is.

        Raises:
            InputError: A field is wrong, or the format is one that this version does not read.
        """
        forms = read_forms({name: value for name, value in config.items() if name not in ADDED})
        check_bases(forms)
        if names := materialized(forms):
            logger.info(
                "%d linears with stored entries (%s, ...) are multiplied out: they take the memory "
                "and the time of dense ones",
                len(names),
                names[0],
            )
        return cls(forms, config.get("packed_modules_mapping") or {})

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: WeightsMapper) -> None:
        """Change the names of linears, and those in their forms, to the names in SGLang's model."""

        def renamed(name: str) -> str:
            return (hf_to_sglang_mapper._map_name(name) or name) if name else ""

        self.forms = {
            renamed(name): replace(form, basis=renamed(form.basis))
            for name, form in self.forms.items()
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer; None for one that is dense by its kind.

        Raises:
            InputError: The config names a layer that this package cannot serve compressed.
        """
        names = [prefix]
        if prefix not in self.forms:
            names = stored_names(prefix, self.packed_modules_mapping)
        found = [name for name in names if name in self.forms]
        if isinstance(layer, LinearBase):
            if not found:
                return UnquantizedLinearMethod()
            known = prefix.rpartition(".")[2] in self.packed_modules_mapping
            if isinstance(layer, QKVParallelLinear) and not known:
                raise InputError(
                    f"{prefix}: the checkpoint has queries, keys and values in one linear, whose "
                    "rows SGLang may put in another order while loading; serve the dense export"
                )
            forms = {name: self.forms.get(name) for name in names}
            return FactoredLinearMethod(self, prefix, forms)
        if found:
            raise InputError(
                f"{prefix}: a {type(layer).__name__} cannot be compressed; serve the dense export"
            )
        if isinstance(layer, FusedMoE):
            self._refuse_experts(prefix)
        return None

    def _refuse_experts(self, prefix: str) -> None:
        """Raise InputError if an expert of a layer is compressed."""
        inside = [name for name in self.forms if name.startswith(f"{prefix}.")]
        if inside:
            raise InputError(
                f"{inside[0]}: compressed experts are not served; serve the dense export"
            )

    def claim(self, names: Iterable[str]) -> None:
        """Note that a layer of the model has these linears."""
        self._claimed |= set(names)

    def check_claimed(self) -> None:
        """Raise InputError if the config names a linear that no layer of the model has.

        A pipeline stage has a part of the layers, so this is checked for a single stage alone.
        """
        unknown = [name for name in self.forms if name not in self._claimed]
        if unknown and get_parallel().pp_size == 1:
            raise InputError(
                f"{unknown[0]}: SGLang's model has no such linear; the config is another model's, "
                "or SGLang joins linears that this version does not know; serve the dense export"
            )
