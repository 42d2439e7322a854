"""The files of a compressed checkpoint: a function of the plan, whoever writes them.

`layout` says which tensor lies in which file, `write_file` writes one of them, anywhere, and
`finish` adds what is not a tensor, config.json last.

Shape suffixes: O outputs, I inputs, R rank.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator import __version__
from orchestrator.errors import InputError
from orchestrator.models.card import model_card
from orchestrator.models.forms import FORMAT_VERSION, METHOD
from orchestrator.models.names import StoredTensor
from orchestrator.models.output import copy_companions, seal, write_json, write_text
from orchestrator.models.safetensors_file import has_header, write_safetensors
from orchestrator.models.weights import INDEX_FILE, SINGLE_FILE, read_json
from orchestrator.plan import Linear, Plan, Survey

BOOTSTRAP_FILE = "modeling_orchestrator.py"
RECIPE_FILE = "recipe.toml"
REPORT_FILE = "orchestrator_report.json"
CARD_FILE = "README.md"

Part = Literal["copy", "weight", "down", "product"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a file, and where it comes from."""

    name: str
    """Its name in the file: the module's, `model.layers.3.mlp.down_proj.down.weight`."""
    dtype: str
    """`bfloat16`."""
    shape: tuple[int, ...]
    part: Part
    """`copy` of a stored tensor; factor `weight` [O, R] or `down` [R, I]; or their `product`."""
    source: str
    """Name on disk of the tensor that is copied, or name of the linear."""
    rank: int = 0

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.values * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """One safetensors file."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors; the header is not counted."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def announced(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor, by name: all that the header says."""
        return {tensor.name: (tensor.torch_dtype, tensor.shape) for tensor in self.tensors}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "FileSpec":
        tensors = [
            TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in value["tensors"]
        ]
        return cls(name=value["name"], tensors=tuple(tensors))


def layout(
    survey: Survey,
    tensors: Sequence[StoredTensor],
    plan: Plan,
    *,
    output_dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> tuple[FileSpec, ...]:
    """The files of the checkpoint; from the plan and the size limit alone, nothing is read.

    Whole blocks in model order, as many to a file as fit and one at least; what comes before the
    blocks stands with the first of them, what comes after with the last. Sizes in bytes.

    Args:
        tensors: What is stored of the dense model, in model order.
        output_dtype: Dtype of every floating-point tensor; None keeps the one on disk, and gives
            the factors the dtype of the dense weight.

    Raises:
        ValueError: The plan gives a linear a rank that saves nothing, or names no linear.
    """
    ranks = low_rank_plan(survey, plan)
    linears = {f"{linear.name}.weight": linear for linear in survey.linears}
    groups: list[list[TensorSpec]] = [[] for _ in range(survey.num_blocks)]
    for tensor in tensors:
        outside = 0 if tensor.place == "front" else survey.num_blocks - 1
        group = groups[outside if tensor.block is None else tensor.block]
        linear = linears.get(tensor.name)
        rank = ranks.get(linear.name, 0) if linear else 0
        group += _specs(tensor, linear, rank, output_dtype)
    files: list[list[TensorSpec]] = []
    size_bytes = 0
    for group in groups:
        group_bytes = sum(spec.size_bytes for spec in group)
        if not files or size_bytes + group_bytes > max_shard_bytes:
            files.append([])
            size_bytes = 0
        files[-1] += group
        size_bytes += group_bytes
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE_FILE]
    pairs = zip(names, files, strict=True)
    return tuple(FileSpec(name=name, tensors=tuple(specs)) for name, specs in pairs)


def write_file(spec: FileSpec, path: Path, read: Callable[[TensorSpec], Tensor]) -> dict[str, Any]:
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
    return {"name": spec.name, "bytes": path.stat().st_size, "blake2b": blake2b}


def finish(
    out: Path,
    *,
    dense: Path,
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
        survey, plan, base_model=base_model, dense_card=dense / CARD_FILE, metrics=metrics or {}
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
    ranks = low_rank_plan(survey, plan)
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
        "modules": {name: {"form": "low_rank", "rank": rank} for name, rank in ranks.items()},
        "modules_to_not_convert": [each.name for each in survey.linears if each.name not in ranks],
    }
    return config


def low_rank_plan(survey: Survey, plan: Plan) -> dict[str, int]:
    """Rank of every linear that gets factors, in survey order.

    Raises:
        ValueError: The plan names no linear of the model, or gives a rank that saves nothing.
    """
    linears = {linear.name: linear for linear in survey.linears}
    ranks = {}
    for name, assignment in plan.assignments.items():
        if name not in linears:
            raise ValueError(f"plan: no linear {name!r} in {survey.architecture}")
        if assignment.form == "low_rank":
            if not 0 < assignment.rank < linears[name].break_even:
                raise ValueError(f"plan: {name} has rank {assignment.rank}; keep it dense instead")
            ranks[name] = assignment.rank
    return {name: ranks[name] for name in linears if name in ranks}


def write_index(out: Path, files: Sequence[FileSpec]) -> None:
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


def _specs(
    tensor: StoredTensor, linear: Linear | None, rank: int, output_dtype: torch.dtype | None
) -> list[TensorSpec]:
    """What one stored tensor becomes: itself, or the two factors of its linear."""
    dtype = tensor.dtype
    if output_dtype is not None and getattr(torch, dtype).is_floating_point:
        dtype = dtype_name(output_dtype)
    if not rank or linear is None:
        return [
            TensorSpec(
                name=tensor.name,
                dtype=dtype,
                shape=tensor.shape,
                part="copy",
                source=tensor.disk_name,
            )
        ]
    m, n = linear.out_features, linear.in_features
    factors: tuple[tuple[Part, str, tuple[int, int]], ...] = (
        ("weight", f"{linear.name}.weight", (m, rank)),
        ("down", f"{linear.name}.down.weight", (rank, n)),
    )
    return [
        TensorSpec(name=name, dtype=dtype, shape=shape, part=part, source=linear.name, rank=rank)
        for part, name, shape in factors
    ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())  # NaN spreads to both
