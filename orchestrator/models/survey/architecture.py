"""Architecture of a model from its config: class, meta-device module, list of decoder blocks.

Only classes of transformers itself are instantiated. No value of a config is used as code, as a
path, or as the name of a kernel to download.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import ContextManagers

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.headers import quoted, read_json
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.forms.config import METHOD
from orchestrator.models.forms.install import install_forms
from orchestrator.models.survey.config import (
    FORMS_KEYS,
    MAX_REPEATS,
    check_config,
    check_not_quantised,
)
from orchestrator.store.places import Place

MAX_BUFFER_BYTES = 2**30
"""Limit of a model's buffers, which are computed and not stored: masks, rotary frequencies."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Class and config of a model, with the forms of its linears if orchestrator compressed it."""

    directory: Path
    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    forms: Mapping[str, Any] | None
    """The `quantization_config` of a compressed checkpoint; None for a dense one."""

    @classmethod
    def read(cls, place: Place) -> "Architecture":
        """Read the config.json of a checkpoint, or a config alone, a local file.

        Raises:
            InputError: The class or model type is unknown or missing, another program has
                quantised the checkpoint, or a number is not finite.
        """
        if isinstance(place, Path) and place.is_file():
            path = place
        else:
            path = small_files(place) / "config.json"
        content = read_json(path)
        check_not_quantised(path, content, ours=METHOD)
        check_config(path, content)
        model_type = content.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise InputError(
                f"{path}: model_type is {quoted(model_type)}, "
                f"unknown to transformers {transformers.__version__}"
            )
        model_class = _find_class(path, content.get("architectures"))
        try:
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # a config class may raise anything on unexpected values
            raise InputError(f"{path}: not a valid {model_type} config: {brief(error)}") from error
        if not isinstance(config, model_class.config_class):
            raise InputError(
                f"{path}: architectures names {model_class.__name__}, "
                f"which does not match model_type {model_type!r}"
            )
        # decoders of such models alone are classes of their own, with the same config
        if config.is_encoder_decoder and not model_class.__name__.endswith("ForCausalLM"):
            raise InputError(
                f"{path}: architectures names {model_class.__name__}, an encoder-decoder model; "
                "models with one stack of decoder blocks are supported, such as llama, mistral, "
                "qwen3, gemma2, phi3 or gpt2"
            )
        # Removed, because building the class would otherwise look for the quantiser's modules.
        for key in FORMS_KEYS:
            vars(config).pop(key, None)
        return cls(path.parent, model_class, config, content.get("quantization_config"))

    def build(self, dtype: torch.dtype, *, stored: int) -> PreTrainedModel:
        """Build the model in eval mode with every parameter and buffer on the meta device.

        Every matrix of an expert is a linear, and linears have the checkpoint's forms. Arguments
        and errors as for `build_native`.

        Raises:
            InputError: Also if the model's experts are not supported, see `replace_experts`.
        """
        model = self.build_native(dtype, stored=stored)
        try:
            replace_experts(model)
        except InputError as error:
            raise InputError(f"{self.directory}: {error}") from error
        if self.forms is not None:
            install_forms(model, self.forms)
        mark_all_initialized(model)
        return model.eval()

    def build_native(self, dtype: torch.dtype, *, stored: int) -> PreTrainedModel:
        """Build the model as its class does, on the meta device, without forms.

        It is built inside the contexts that `from_pretrained` uses, so that default dtype and
        patches are the same. Weights are not tied. Attention is `sdpa` if the class supports it,
        else `eager`; the config's choice is ignored.

        Args:
            stored: Number of tensors in the checkpoint; limits the number of parameters built.

        Raises:
            InputError: The class rejects the config, or builds far more parameters or buffers
                than a checkpoint of this size can have.
        """
        try:
            config = copy.deepcopy(self.config)
            config._attn_implementation = None
            parts = [getattr(config, name) for name in config.sub_configs]
            for part in [config, *(part for part in parts if part is not None)]:
                part.use_cache, part.dtype = False, dtype
            contexts = self.model_class.get_init_context(dtype, False, False, None)
            with ContextManagers(contexts), _limited_parameters(2 * stored + MAX_REPEATS):
                model = self.model_class(config)
        except Exception as error:  # a model class may raise anything on unexpected values
            raise InputError(
                f"{self.directory}: config.json does not make a {self.model_class.__name__}: "
                f"{brief(error)}"
            ) from error
        size_bytes = sum(buffer.nbytes for buffer in model.buffers())
        if size_bytes > MAX_BUFFER_BYTES:
            raise InputError(
                f"{self.directory}: config.json makes a {self.model_class.__name__} with "
                f"{size_bytes} bytes of buffers; at most {MAX_BUFFER_BYTES} are computed"
            )
        return model


def find_blocks(model: PreTrainedModel, directory: Place) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks and its module name: `("model.layers", ModuleList)`.

    It is the list with `num_hidden_layers` entries under the decoder; if several match (nested
    lists), the one with the most parameters.

    Raises:
        InputError: No list matches.
    """
    try:
        num_blocks = model.config.get_text_config(decoder=True).num_hidden_layers
        decoder = model.get_decoder()
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"{directory}: {type(model).__name__} has no decoder with num_hidden_layers: "
            f"{brief(error)}"
        ) from error
    for root in (decoder, model):
        inside = {id(module) for module in root.modules()}
        stacks = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and id(module) in inside
            and len(module) == num_blocks > 0
        ]
        if stacks:
            return max(stacks, key=lambda stack: sum(p.numel() for p in stack[1].parameters()))
    raise InputError(
        f"{directory}: {type(model).__name__} has no list of num_hidden_layers = {num_blocks} "
        "blocks; only models with one stack of decoder blocks are supported"
    )


def recompute_buffers(model: PreTrainedModel, modules: Iterable[Any], device: torch.device) -> None:
    """Compute the initial values of the buffers that `modules` own directly, on `device`.

    Follows `from_pretrained` for buffers that are not stored: the class's own initialisation runs
    again and leaves everything marked as initialised (all parameters) unchanged.
    """
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = False
    model.initialize_weights()


def mark_initialized(value: Any) -> None:
    """Mark a module or tensor so that transformers does not initialise it again."""
    value._is_hf_initialized = True


def mark_all_initialized(model: PreTrainedModel) -> None:
    """Mark all modules and parameters, which have no values to compute."""
    for each in (*model.parameters(), *model.modules()):
        mark_initialized(each)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` by a tensor."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if child in module._buffers:
        module._buffers[child] = tensor
        return
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    mark_initialized(parameter)
    module._parameters[child] = parameter


def brief(error: BaseException) -> str:
    """Type and first line of an error raised by foreign code."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def _limited_parameters(limit: int) -> Iterator[None]:
    """Stop a class from building more than `limit` parameters, which might take hours."""
    count = 0

    def count_parameter(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError(f"more than {limit} parameters, far more than are stored")

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        yield
    finally:
        handle.remove()


def _find_class(path: Path, architectures: Any) -> type[PreTrainedModel]:
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise InputError(
            f"{path}: architectures is {quoted(architectures)}; one class name is expected"
        )
    (name,) = architectures
    try:
        found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    except Exception:  # importing a transformers module may raise anything
        found = None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model:
        raise InputError(
            f"{path}: architectures names {quoted(name)}, which is not a model class of "
            f"transformers {transformers.__version__}"
        )
    if not found.can_generate():
        raise InputError(f"{path}: architectures names {name}; a causal language model is needed")
    model_class: type[PreTrainedModel] = found
    return model_class
