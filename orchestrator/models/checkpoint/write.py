"""The files of a compressed checkpoint: the same bytes for the same plan, whoever writes them.

`layout` says which tensor lies in which file, `write_file` writes one of them, anywhere, and
`finish` adds what is not a tensor, config.json last.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.card import model_card
from orchestrator.models.checkpoint.headers import INDEX_FILE, read_json
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec, dtype_name, stored_forms
from orchestrator.models.checkpoint.output import copy_companions, seal, write_json, write_text
from orchestrator.models.checkpoint.safetensors_file import has_header, write_safetensors
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.forms.config import FORMAT_VERSION, METHOD
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Plan
from orchestrator.store.files import size_of
from orchestrator.store.places import Place
from orchestrator.version import __version__

BOOTSTRAP_FILE = "modeling_orchestrator.py"
RECIPE_FILE = "recipe.toml"
REPORT_FILE = "orchestrator_report.json"
CARD_FILE = "README.md"


def write_file(spec: FileSpec, path: Place, read: Callable[[TensorSpec], Tensor]) -> dict[str, Any]:
    """Writes one file atomically and durably, with one tensor in memory at a time.

    `read` gives each tensor in its shape, on any device and in any dtype; it is cast here. The
    result is the manifest entry `{"name", "bytes", "blake2b"}`. Equal tensors give equal bytes.

    Raises:
        InputError: A tensor that is no bare copy holds NaN or infinity, perhaps by the cast.
        OrchestratorError: The device has no space left, or refuses the write.
    """
    specs = {tensor.name: tensor for tensor in spec.tensors}

    def read_cast(name: str) -> Tensor:
        tensor, given = specs[name], read(specs[name])
        result = given.to(tensor.torch_dtype)
        is_bare_copy = tensor.part == "copy" and given.dtype == tensor.torch_dtype
        if not is_bare_copy and not _is_finite(result):
            raise InputError(
                f"{path}: {name} holds NaN or infinity in {tensor.dtype}; check the weights, "
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
) -> None:
    """Completes a claimed directory whose files are written; idempotent until config.json stands.

    Copies tokenizer and licence files byte for byte, writes bootstrap, recipe, report, model card
    and index, removes weights that an earlier attempt left, and writes config.json last.

    Args:
        dense: Directory of the dense checkpoint.
        base_model: What the card and the config call the dense model: a hub id, or a bare name.
        recipe: The resolved recipe, TOML.
        report: Written as JSON.
        bootstrap: Source of the file for `trust_remote_code`, `orchestrator.hf.bootstrap`.
        metrics: Name and value, shown in the card.

    Raises:
        InputError: The dense config is damaged, or a file is missing or not the one laid out.
        OrchestratorError: The directory cannot be written.
    """
    config = make_config(
        read_json(dense / "config.json"),
        survey,
        plan,
        base_model=base_model,
        output_dtype=output_dtype,
    )
    copy_companions(dense, out)
    write_index(out, files)
    write_text(out / BOOTSTRAP_FILE, bootstrap)
    write_text(out / RECIPE_FILE, recipe)
    write_json(out / REPORT_FILE, report)
    card = model_card(
        survey,
        plan,
        base_model=base_model,
        dense_card=small_files(dense) / CARD_FILE,
        metrics=metrics or {},
    )
    write_text(out / CARD_FILE, card)
    seal(out, config)


def make_config(
    dense: Mapping[str, Any],
    survey: Survey,
    plan: Plan,
    *,
    base_model: str,
    output_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The dense config.json with what loading the compressed model takes; other fields stay."""
    forms = stored_forms(survey, plan)
    # a name of a weights file in the dense directory; ours has the usual names
    config = {key: value for key, value in dense.items() if key != "transformers_weights"}
    if output_dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype_name(output_dtype)
    module = BOOTSTRAP_FILE.removesuffix(".py")
    config["auto_map"] = {"AutoModelForCausalLM": f"{module}.{survey.architecture}"}
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "producer": f"orchestrator {__version__}",
        "base_model": base_model,
        "base_fingerprint": survey.fingerprint,
        "modules": {name: form.to_json() for name, form in forms.items()},
        "modules_to_not_convert": [each.name for each in survey.linears if each.name not in forms],
    }
    return config


def write_index(out: Place, files: Sequence[FileSpec]) -> None:
    """Checks the files against the layout, removes other weights, and writes the index of several.

    Raises:
        InputError: A file is missing, or is not the one laid out.
    """
    for file in files:
        if not has_header(out / file.name, file.announced):
            raise InputError(f"{out / file.name}: missing, or not as laid out; write it again")
    names = {file.name for file in files}
    for path in out.iterdir():
        is_weights = re.fullmatch(r"model.*\.safetensors(\.index\.json)?", path.name)
        if (is_weights and path.name not in names) or re.fullmatch(r"\..*\.tmp", path.name):
            path.unlink()
    if len(files) == 1:
        return
    tensors = [tensor for file in files for tensor in file.tensors]
    metadata = {
        "total_parameters": sum(tensor.values for tensor in tensors),
        "total_size": sum(tensor.size_bytes for tensor in tensors),
    }
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / INDEX_FILE, index)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN spreads to both
