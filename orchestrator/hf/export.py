"""Export of a compressed checkpoint as a dense one, for programs that know no forms.

Shape suffixes: O outputs, I inputs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.models.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_json
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec, dtype_name
from orchestrator.models.checkpoint.other_formats import check_compressed
from orchestrator.models.checkpoint.output import claim_out, copy_companions, seal
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.checkpoint.write import write_file, write_index
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.forms.install import install_forms
from orchestrator.models.shards.dense_weight import read_dense_weight
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.names import Names, map_names


def export_dense(directory: Path, out: Path) -> None:
    """Write the dense checkpoint with every weight multiplied and filled out, file by file.

    Products and sums are taken in fp32 on the CPU and cast to the stored dtype. Memory: one linear
    and what is stored of it in fp32. The result has the native tensor names and loads with stock
    transformers; it saves nothing, and its logits differ from the compressed model's by rounding.

    Raises:
        UsageError: `out` holds something else.
        InputError: `directory` holds no sound checkpoint that orchestrator compressed.
        OrchestratorError: `out` cannot be written.
    """
    check_compressed(directory, "export")
    weights = Weights.open(directory)
    config = read_json(directory / "config.json")
    architecture = Architecture.read(directory)
    stored = len(weights.names)
    model = replace(architecture, forms=None).build(torch.float32, stored=stored)
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    install_forms(model, config["quantization_config"])
    names = map_names(model, weights)

    def read(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return weights.read(spec.source)
        weight_OI = read_dense_weight(model, spec.source, weights, names)
        return weight_OI.T if spec.source in transposed else weight_OI

    claim_out(out)
    files = _dense_files(model, weights, names, transposed)
    for file in files:
        write_file(file, out / file.name, read)
    copy_companions(directory, out)
    write_index(out, files)
    dropped = {"quantization_config", "auto_map"}
    seal(out, {key: value for key, value in config.items() if key not in dropped})


def _dense_files(
    model: PreTrainedModel, weights: Weights, names: Names, transposed: set[str]
) -> tuple[FileSpec, ...]:
    """Files of the dense checkpoint: one weight in the place of the stored tensors of a linear."""
    is_single = (weights.directory / SINGLE_FILE).is_file()
    places: Mapping[str, str] = {}
    if not is_single:
        places = read_json(weights.directory / INDEX_FILE)["weight_map"]
    parts: set[str] = set()
    linears: dict[str, tuple[str, FormLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FormLinear) and f"{name}.weight" not in parts:
            parts |= {f"{name}.{key}" for key in module.state_dict() if key != "bias"}
            linears[f"{name}.weight"] = name, module
    files: dict[str, list[TensorSpec]] = {}
    for tensor, disk_name in names.disk.items():
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
        files.setdefault(places.get(disk_name, SINGLE_FILE), []).append(spec)
    return tuple(FileSpec(name=name, tensors=tuple(specs)) for name, specs in files.items())
