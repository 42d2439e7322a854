"""Compressed checkpoints as a "quantization method" of transformers: its one way to swap modules.

`from_pretrained` reads `quantization_config` of config.json, finds this quantizer by its
`quant_method`, builds the model without weights, lets the quantizer swap modules, and only then
loads. Sharding, offload, dtype and saving stay what they are for any other model.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from orchestrator.errors import InputError
from orchestrator.hf.tensor_parallel import split
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.forms.config import METHOD, read_forms
from orchestrator.models.forms.guards import check_guards, without_guards
from orchestrator.models.forms.install import install_forms


class OrchestratorConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers has no types
    """The field `quantization_config` of config.json, checked when it is made."""

    def __init__(self, **fields: Any) -> None:
        read_forms(fields)
        self.__dict__.update(fields)


class OrchestratorQuantizer(HfQuantizer):  # type: ignore[misc] # transformers has no types
    """Installs the modules that a model's config names; the weights come from the checkpoint."""

    # "calibration" is compression itself: this class loads what was compressed, and no more
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        install_forms(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Check the loaded indices: one that is not stored would put values anywhere.

        Raises:
            InputError: An index does not name as many entries as there are values, or every output;
                or experts were stored with other ranks than the config's.
        """
        check_guards(model, read_forms(self.quantization_config.to_dict()))
        for name, module in model.named_modules():
            if not isinstance(module, FormLinear):
                continue
            is_here = not any(index.is_meta for index in module.buffers(recurse=False))
            if is_here and not module.is_sound():
                raise InputError(
                    f"{name}: its index does not name {module.indexed}; the checkpoint is damaged"
                )
        # a native class does not write the file that `auto_map` points to when it is saved
        if not model.is_remote_code() and hasattr(model.config, "auto_map"):
            del model.config.auto_map

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Leave out conversions that would be applied to guards, in loading and in saving."""
        kept = without_guards(model, weight_conversions)
        updated: list[Any] = super().update_weight_conversions(kept, model)
        return updated

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Replace the rules of compressed linears by rules that know their forms."""
        split(model, plan)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Check a model that is about to be saved; transformers decides what is written.

        Raises:
            InputError: An adapter is not merged, so nothing could load what would be written.
        """
        names = [name for name, _ in model.named_parameters() if ".base_layer." in name]
        # under transformers' own `add_adapter` the adapter alone is saved
        if names and not getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                f"{names[0]}: cannot be saved inside an adapter; merge it (merge_and_unload), "
                "and adapt one factor at a time"
            )
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: `Trainer` needs no adapters, since the model's values are plain parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Register the format with `from_pretrained`; another call has no effect."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(OrchestratorConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(OrchestratorQuantizer)
