"""Export of a compressed checkpoint as a dense one, for programs that know no forms.

Shape suffixes: O outputs, I inputs.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.hf.dense_layout import EXPERTS, DenseLayout
from orchestrator.hf.fewer_experts import (
    ZEROS,
    experts_modules,
    fewer_experts,
    renumbered,
    zeros_of,
)
from orchestrator.models.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_json
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec, dtype_name
from orchestrator.models.checkpoint.other_formats import check_compressed
from orchestrator.models.checkpoint.output import claim_out, copy_companions, seal
from orchestrator.models.checkpoint.weights import Checkpoint, Weights
from orchestrator.models.checkpoint.write import write_file, write_index
from orchestrator.models.experts.module import Experts
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.forms.install import install_forms
from orchestrator.models.shards.dense_weight import read_dense_weight
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.expert_weights import view_experts
from orchestrator.models.survey.names import Names, map_names


def export_dense(directory: Path, out: Path) -> None:
    """Write the dense checkpoint with every weight multiplied and filled out, file by file.

    Products and sums are taken in fp32 on the CPU and cast to the stored dtype. Memory: one linear
    and what is stored of it in fp32; of experts that are stored as one tensor, one expert. The
    result has the native tensor names, with experts the names and the layout on disk, and loads
    with stock transformers; its logits differ from the compressed model's by rounding. It has
    the size of the dense model, or fewer experts where routers lost the rows of dropped ones.

    Raises:
        UsageError: `out` holds something else.
        InputError: `directory` holds no sound checkpoint that orchestrator compressed, or a linear
            has a bias for which the class of the dense model has no place.
        OrchestratorError: `out` cannot be written.
    """
    check_compressed(directory, "export")
    stored = Weights.open(directory)
    config = read_json(directory / "config.json")
    architecture = Architecture.read(directory)
    dense = replace(architecture, forms=None)
    model = dense.build(torch.float32, stored=len(stored.names))
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    places = {*model.state_dict()}
    install_forms(model, config["quantization_config"])
    _check_biases(model, places)
    weights = view_experts(stored, architecture)
    names = map_names(model, weights)
    files = _dense_files(model, weights, names, places=_places(stored), transposed=transposed)
    layout, modules = None, experts_modules(model)
    if modules:
        dense, config = fewer_experts(dense, config, modules)
        files = renumbered(files, modules)
        native = dense.build_native(torch.float32, stored=len(stored.names))
        layout = DenseLayout(native, directory)
    specs = {spec.name: spec for file in files for spec in file.tensors}
    if layout is not None:
        files = layout.arranged(files)

    def read_one(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return weights.read(spec.source)
        if spec.part == ZEROS:
            return torch.zeros(spec.shape)
        weight_OI = read_dense_weight(model, spec.source, weights, names)
        return weight_OI.T if spec.source in transposed else weight_OI

    def read(spec: TensorSpec) -> Tensor | Iterator[Tensor]:
        if layout is not None and spec.part == EXPERTS:
            return layout.entries(spec, lambda name: read_one(specs[name]))
        return read_one(spec)

    claim_out(out)
    for file in files:
        write_file(file, out / file.name, read)
    copy_companions(directory, out)
    write_index(out, files)
    dropped = {"quantization_config", "auto_map"}
    seal(out, {key: value for key, value in config.items() if key not in dropped})


def _check_biases(model: PreTrainedModel, places: Collection[str]) -> None:
    """Raise InputError if a compressed linear has a bias that the dense model has no tensor for."""
    for name, module in model.named_modules():
        is_own = isinstance(module, FormLinear) and module.bias is not None
        if is_own and not module.keeps_bias and f"{name}.bias" not in places:
            raise InputError(
                f"{name}: its bias has no place in a dense {type(model).__name__}, so that it "
                "cannot be exported; load the compressed checkpoint itself"
            )


def _places(stored: Weights) -> Mapping[str, str]:
    """File of every tensor; empty if there is one file."""
    if (stored.directory / SINGLE_FILE).is_file():
        return {}
    places: Mapping[str, str] = read_json(stored.directory / INDEX_FILE)["weight_map"]
    return places


def _dense_files(
    model: PreTrainedModel,
    weights: Checkpoint,
    names: Names,
    *,
    places: Mapping[str, str],
    transposed: set[str],
) -> tuple[FileSpec, ...]:
    """Files of the dense checkpoint: one weight in the place of the stored tensors of a linear."""
    parts = {
        f"{name}.{guard}"
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for guard in module._buffers
    }
    linears: dict[str, tuple[str, FormLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FormLinear) and f"{name}.weight" not in parts:
            parts |= {f"{name}.{key}" for key in module.state_dict() if key != "bias"}
            linears[f"{name}.weight"] = name, module
    # a linear whose weight is another's stands beside that
    shared = {name: names.disk[names.tied[name]] for name in linears if name in names.tied}
    files: dict[str, list[TensorSpec]] = {}
    for tensor, disk_name in (dict(names.disk) | shared).items():
        part, shape, source = "copy", weights.shape(disk_name), disk_name
        if tensor in linears:
            source, module = linears[tensor]
            part = "dense"
            shape = (module.out_features, module.in_features)
            if source in transposed:
                shape = (module.in_features, module.out_features)
        elif tensor in parts:
            continue
        spec = TensorSpec(
            name=tensor,
            dtype=dtype_name(weights.dtype(disk_name)),
            shape=shape,
            part=part,
            source=source,
        )
        origin = weights.origin(disk_name)
        place = places.get(disk_name if origin is None else origin[0], SINGLE_FILE)
        files.setdefault(place, []).append(spec)
    for name, module in experts_modules(model).items():
        if not module._buffers:
            continue  # experts are stored as the class does
        disk_name = names.disk[f"{name}.{next(iter(module._buffers))}"]
        specs = files[places.get(disk_name, SINGLE_FILE)]
        dtype = next(spec.dtype for spec in specs if spec.name.startswith(f"{name}."))
        specs += zeros_of(name, module, dtype)
    return tuple(FileSpec(name=name, tensors=tuple(specs)) for name, specs in files.items())
