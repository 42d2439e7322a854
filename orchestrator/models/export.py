"""A compressed checkpoint multiplied back to a dense one, for programs that know no factors.

Shape suffixes: O outputs, I inputs, R rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.models.architecture import Architecture
from orchestrator.models.checkpoint import (
    FileSpec,
    Part,
    TensorSpec,
    dtype_name,
    write_file,
    write_index,
)
from orchestrator.models.forms import LowRankLinear, install_forms
from orchestrator.models.names import map_names
from orchestrator.models.output import claim_out, copy_companions, seal
from orchestrator.models.weights import INDEX_FILE, SINGLE_FILE, Weights, read_json


def export_dense(directory: Path, out: Path) -> None:
    """Writes the dense checkpoint with the weights `weight_OR @ down_RI`, file by file.

    Products are taken in fp32 on the CPU and cast to the factors' dtype. Memory: one linear and its
    factors in fp32. The result has the native tensor names and loads with stock transformers; it
    saves nothing, and its logits differ from the compressed model's by the products' rounding.

    Raises:
        UsageError: `out` holds something else.
        InputError: `directory` holds no sound checkpoint that orchestrator compressed.
        OrchestratorError: `out` cannot be written.
    """
    weights = Weights.open(directory)
    config = read_json(directory / "config.json")
    architecture = Architecture.read(directory)
    if architecture.forms is None:
        raise InputError(f"{directory}: is not compressed by orchestrator; there is nothing to do")
    model = replace(architecture, forms=None).build(weights.dtype(weights.names[0]))
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    install_forms(model, architecture.forms)
    disk = map_names(model, weights).disk

    def read(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return weights.read(spec.source)
        weight_OR = weights.read(disk[f"{spec.source}.weight"]).float()
        weight_OI = weight_OR @ weights.read(disk[f"{spec.source}.down.weight"]).float()
        return weight_OI.T if spec.source in transposed else weight_OI

    claim_out(out)
    files = _dense_files(model, weights, disk, transposed)
    for file in files:
        write_file(file, out / file.name, read)
    copy_companions(directory, out)
    write_index(out, files)
    dropped = {"quantization_config", "auto_map"}
    seal(out, {key: value for key, value in config.items() if key not in dropped})


def _dense_files(
    model: nn.Module, weights: Weights, disk: Mapping[str, str], transposed: set[str]
) -> tuple[FileSpec, ...]:
    """The same files, with one dense weight in the place of each pair of factors."""
    is_single = (weights.directory / SINGLE_FILE).is_file()
    places = {} if is_single else read_json(weights.directory / INDEX_FILE)["weight_map"]
    low_rank = {
        f"{name}.weight": (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
    }
    downs = {f"{name}.down.weight" for name, _ in low_rank.values()}
    files: dict[str, list[TensorSpec]] = {}
    for tensor, disk_name in disk.items():
        part: Part = "copy"
        shape, source = weights.shape(disk_name), disk_name
        if tensor in downs:
            continue
        if tensor in low_rank:
            source, module = low_rank[tensor]
            part = "product"
            shape = (module.out_features, module.in_features)
            if source in transposed:
                shape = (module.in_features, module.out_features)
        spec = TensorSpec(
            name=tensor,
            dtype=dtype_name(weights.dtype(disk_name)),
            shape=shape,
            part=part,
            source=source,
        )
        files.setdefault(places.get(disk_name, SINGLE_FILE), []).append(spec)
    return tuple(FileSpec(name=name, tensors=tuple(specs)) for name, specs in files.items())
