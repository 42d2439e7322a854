"""Writing of a compressed checkpoint; equal plans give equal bytes on any worker.

`layout` assigns tensors to files, `write_file` writes one file on any worker, and `finish` adds
the other files, config.json last.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.auto_classes import auto_classes
from orchestrator.models.checkpoint.card import model_card
from orchestrator.models.checkpoint.digests import (
    CONFIG_FILE,
    REPORT_DIGEST,
    config_digest,
    report_digest,
)
from orchestrator.models.checkpoint.headers import INDEX_FILE, read_json
from orchestrator.models.checkpoint.layout import (
    GUARD,
    FileSpec,
    TensorSpec,
    dtype_name,
    forms_fields,
    make_guard,
    router_rows,
    stored_forms,
)
from orchestrator.models.checkpoint.output import (
    LEASE_FILE,
    copy_companions,
    seal,
    write_json,
    write_text,
)
from orchestrator.models.checkpoint.safetensors_file import has_header, write_safetensors
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.forms.config import METHOD
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Plan
from orchestrator.plan.result import REPORT_FILE
from orchestrator.store.files import size_of
from orchestrator.store.places import Place
from orchestrator.version import __version__

BOOTSTRAP_FILE = "modeling_orchestrator.py"
RECIPE_FILE = "recipe.toml"
CARD_FILE = "README.md"


def write_file(
    spec: FileSpec, path: Place, read: Callable[[TensorSpec], Tensor | Iterator[Tensor]]
) -> dict[str, Any]:
    """Write one file atomically and durably, with one tensor in memory at a time.

    `read` returns each tensor in its shape, or an iterator over pieces whose values adjoin, on any
    device and in any dtype; it is cast here. The result is the manifest entry
    `{"name", "bytes", "blake2b"}`. Equal tensors give equal bytes.

    Raises:
        InputError: A tensor other than an unchanged copy has NaN or infinity, possibly from the
            cast.
        OrchestratorError: The device has no space left, or refuses the write.
    """
    specs = {tensor.name: tensor for tensor in spec.tensors}

    def read_cast(name: str) -> Tensor | Iterator[Tensor]:
        tensor = specs[name]
        if tensor.part == GUARD:
            return make_guard(tensor, spec.tensors)
        given = read(tensor)
        if isinstance(given, Tensor):
            return cast(tensor, given)
        return (cast(tensor, piece) for piece in given)

    def cast(tensor: TensorSpec, given: Tensor) -> Tensor:
        result = given.to(tensor.torch_dtype)
        is_unchanged_copy = tensor.part == "copy" and given.dtype == tensor.torch_dtype
        if not is_unchanged_copy and not _is_finite(result):
            raise InputError(
                f"{path}: {tensor.name} has NaN or infinity in {tensor.dtype}; check the weights, "
                "or give an output dtype with a wider range"
            )
        return result

    blake2b = write_safetensors(path, spec.announced, read_cast)
    return {"name": spec.name, "bytes": size_of(path), "blake2b": blake2b}


def finish(
    out: Place,
    *,
    dense: Place,
    survey: Survey,
    plan: Plan,
    files: Sequence[FileSpec],
    base_model: str,
    output_dtype: torch.dtype | None,
    recipe: str,
    report: Mapping[str, Any],
    bootstrap: str,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Complete a claimed directory whose tensor files are written; idempotent until config.json.

    Copies tokenizer, processor and licence files byte for byte, writes bootstrap, recipe, report,
    model card and index, removes weights of an earlier attempt, and writes config.json last.

    Args:
        dense: Directory of the dense checkpoint.
        base_model: Name of the dense model in card and config: a hub id, or a bare name.
        recipe: The resolved recipe as TOML.
        report: The report, with the digests of the tensor files; it is written as JSON with those
            of all files, and returned.
        bootstrap: Source of the file for `trust_remote_code`, `orchestrator.hf.bootstrap`.
        metrics: Measurements by name, shown in the card.

    Raises:
        InputError: The dense config is damaged, or a file is missing or differs from the layout.
        OrchestratorError: The directory cannot be written.
    """
    config = make_config(
        read_json(dense / CONFIG_FILE),
        survey,
        plan,
        base_model=base_model,
        output_dtype=output_dtype,
    )
    card = model_card(
        survey,
        plan,
        base_model=base_model,
        dense_card=small_files(dense) / CARD_FILE,
        metrics=metrics or {},
    )
    digests = {
        **report.get("files", {}),
        **copy_companions(dense, out),
        **write_index(out, files),
        BOOTSTRAP_FILE: write_text(out / BOOTSTRAP_FILE, bootstrap),
        RECIPE_FILE: write_text(out / RECIPE_FILE, recipe),
        CARD_FILE: write_text(out / CARD_FILE, card),
        CONFIG_FILE: config_digest(config),
    }
    complete = {**report, "files": dict(sorted(digests.items()))}
    write_json(out / REPORT_FILE, complete)
    config["quantization_config"][REPORT_DIGEST] = report_digest(complete)
    seal(out, config)
    return complete


def make_config(
    dense: Mapping[str, Any],
    survey: Survey,
    plan: Plan,
    *,
    base_model: str,
    output_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Extend the dense config.json by the fields for loading the compressed model."""
    forms = stored_forms(survey, plan)
    # names a weights file of the dense directory; ours have the usual names
    config = {key: value for key, value in dense.items() if key != "transformers_weights"}
    if survey.has_own_head:
        config = _untied({"tie_word_embeddings": True, **config})
    if output_dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype_name(output_dtype)
    module = BOOTSTRAP_FILE.removesuffix(".py")
    # programs that read the config before the model get to know the forms by its class
    config["auto_map"] = {
        "AutoConfig": f"{module}.{survey.config_class}",
        **dict.fromkeys(auto_classes(survey.reads_images), f"{module}.{survey.architecture}"),
    }
    fields = forms_fields(survey, forms, reroutes=bool(router_rows(survey, plan)))
    in_experts = {name for e in survey.experts for names in e.linears().values() for name in names}
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format_version": fields.pop("format_version"),
        # an object: vLLM asks it for a name before it asks anyone for the method
        "producer": {"name": METHOD, "version": __version__},
        "base_model": base_model,
        "base_fingerprint": survey.fingerprint,
        **fields,
        "modules_to_not_convert": [
            each.name
            for each in survey.linears
            if each.name not in forms and each.name not in in_experts
        ],
    }
    return config


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of a config, and of those in it, in which no embeddings are tied."""
    inner = {name: _untied(value) for name, value in config.items() if isinstance(value, dict)}
    ties = {name: False for name in config if name == "tie_word_embeddings"}
    return {**config, **inner, **ties}


def write_index(out: Place, files: Sequence[FileSpec]) -> dict[str, str]:
    """Check the files against the layout, remove other weights, and write the index if needed.

    Returns the BLAKE2b of the index, by its name. A single file has no index.

    Raises:
        InputError: A file is missing, or differs from the layout.
    """
    for file in files:
        if not has_header(out / file.name, file.announced):
            raise InputError(f"{out / file.name}: missing, or not as planned; write it again")
    names = {file.name for file in files}
    for path in out.iterdir():
        is_weights = re.fullmatch(r"model.*\.safetensors(\.index\.json)?", path.name)
        is_leftover = re.fullmatch(r"\..*\.tmp", path.name)
        # the lease is renewed meanwhile, by a thread that renames its temporary file
        if path.name.startswith(f".{LEASE_FILE}."):
            continue
        if (is_weights and path.name not in names) or is_leftover:
            path.unlink()
    if len(files) == 1:
        return {}
    tensors = [tensor for file in files for tensor in file.tensors]
    metadata = {
        "total_parameters": sum(tensor.values for tensor in tensors),
        "total_size": sum(tensor.size_bytes for tensor in tensors),
    }
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_FILE: write_json(out / INDEX_FILE, index)}


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN propagates to both
