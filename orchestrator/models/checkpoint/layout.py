"""Layout of a compressed checkpoint, tensors by file: a function of the plan alone.

Shape suffixes: O outputs, I inputs, R rank, S = O - R, N nonzeros.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.checkpoint.headers import SINGLE_FILE
from orchestrator.models.checkpoint.stored_tensor import StoredTensor
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import StoredForm
from orchestrator.models.forms.config import DROPPED, PARTS, ROUTER, misfits, write_forms
from orchestrator.models.forms.guards import GONE, guard_values
from orchestrator.plan.forms import FORMS as FORM_SIZES
from orchestrator.plan.linear import ExpertsModule, Linear, Survey
from orchestrator.plan.plan import Assignment, Plan

MEAN = "mean"
"""Part of a weight that stands for those of several linears."""
ADDED = ("members", "experts")
"""Fields of a `TensorSpec` that are left out where they are empty."""
GUARD = "guard"
"""Part of the tensor with the ranks of the experts of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a file, and its source."""

    name: str
    """Its name in the file: the module's, `model.layers.3.mlp.down_proj.down.weight`."""
    dtype: str
    """`bfloat16`."""
    shape: tuple[int, ...]
    part: str
    """`copy` of a stored tensor, or `router`, some rows of one; a part that the linear's form
    names: factor `weight` [O, R] or `down` [R, I]; pivoted the `others` [S, R], the `pivots`
    [R, I] and the `order` [O] of both; `values` [N] of a sparse weight, its `index` or `rows`; the
    `mean` [O, I] of dense weights; the `guard` of experts; or the `dense` weight that an export
    makes of them."""
    source: str
    """Name on disk of the tensor that is copied, or name of the linear or of the experts."""
    rank: int = 0
    """Rank of a factor, or of the factors beside a sparse weight."""
    nonzeros: int = 0
    """Number of entries of a sparse weight, in all its tensors and in the factors beside it."""
    code: str = ""
    """The code of its `index` and `rows`."""
    members: tuple[str, ...] = ()
    """Linears whose dense weights a `mean` is of."""
    experts: tuple[int, ...] = ()
    """Experts whose rows of a router's tensor are copied."""

    @property
    def values(self) -> int:
        """Number of parameters in it; an index says where values stand and has none."""
        is_index = self.part != "copy" and not self.torch_dtype.is_floating_point
        return 0 if is_index else math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

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
        # not by `asdict`, which copies every value of every tensor
        names = [each.name for each in fields(TensorSpec)]
        # keys of units have the specs, in which earlier versions had none of these fields
        tensors = [
            {
                name: getattr(each, name)
                for name in names
                if name not in ADDED or getattr(each, name)
            }
            for each in self.tensors
        ]
        return {"name": self.name, "tensors": tensors}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "FileSpec":
        tensors = []
        for tensor in value["tensors"]:
            tuples = {name: tuple(tensor.get(name, ())) for name in ("shape", *ADDED)}
            tensors.append(TensorSpec(**{**tensor, **tuples}))
        return cls(name=value["name"], tensors=tuple(tensors))


def layout(
    survey: Survey,
    tensors: Sequence[StoredTensor],
    plan: Plan,
    *,
    output_dtype: torch.dtype | None,
    max_shard_bytes: int,
    splits_experts: bool = False,
) -> tuple[FileSpec, ...]:
    """Files of the checkpoint, from the plan and the size limit alone; no tensor is read.

    Whole blocks in model order, as many to a file as fit and one at least; what comes before the
    blocks stands with the first of them, what comes after with the last. Sizes in bytes. Experts of
    which none is compressed are copied as they are stored; otherwise each of their matrices has the
    name of its linear, and a guard stands beside those of a block.

    Args:
        tensors: What is stored of the dense model, in model order.
        output_dtype: Dtype of every floating-point tensor; None keeps the one on disk, and gives
            factors and sparse values the dtype of the dense weight. Indices keep their own.
        splits_experts: Also experts of which none is compressed have the names of linears.

    Raises:
        ValueError: The plan gives a linear a form that it cannot have or that saves nothing, or
            names no linear.
    """
    forms = stored_forms(survey, plan)
    linears = {f"{linear.name}.weight": linear for linear in survey.compressible}
    tied: dict[str, list[str]] = {}
    for name, form in forms.items():
        tied.setdefault(form.basis or name, []).append(name)
    gone = {f"{name}.bias" for name, form in forms.items() if not FORMS[form.form].keeps_bias}
    rows = router_rows(survey, plan)
    has_guards = compresses_experts(survey, forms)
    groups: list[dict[str, TensorSpec]] = [{} for _ in range(survey.num_blocks)]
    for tensor in tensors:
        outside = 0 if tensor.place == "front" else survey.num_blocks - 1
        group = groups[outside if tensor.block is None else tensor.block]
        linear = linears.get(tensor.name)
        dtype = tensor.dtype
        if output_dtype is not None and getattr(torch, dtype).is_floating_point:
            dtype = dtype_name(output_dtype)
        if linear is not None and linear.name in forms:
            specs = _stored_specs(linear, forms[linear.name], dtype, tied.get(linear.name, []))
        elif tensor.name in gone:
            specs = []
        elif tensor.name in rows:
            specs = [_router(tensor, dtype, rows[tensor.name])]
        else:
            specs = [_copy(tensor, dtype, is_fused=not (splits_experts or has_guards))]
        group.update((spec.name, spec) for spec in specs)
    for each in survey.experts if has_guards else ():
        guard = _guard(each)
        groups[each.block][guard.name] = guard
    return _into_files([list(group.values()) for group in groups], max_shard_bytes)


def _into_files(groups: list[list[TensorSpec]], max_shard_bytes: int) -> tuple[FileSpec, ...]:
    """Divide the tensors of blocks into files of at most this size, and of one block at least."""
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


def _copy(tensor: StoredTensor, dtype: str, *, is_fused: bool) -> TensorSpec:
    """The copy of a tensor, or of the tensor on disk that an expert's matrix is a part of."""
    name, source, shape = tensor.name, tensor.disk_name, tensor.shape
    if tensor.fused is not None and is_fused:
        name, shape = tensor.fused
        source = name
    return TensorSpec(name=name, dtype=dtype, shape=shape, part="copy", source=source)


def router_rows(survey: Survey, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the experts that stay, by the names of the router's tensors that lose rows."""
    found: dict[str, tuple[int, ...]] = {}
    for module in survey.experts if plan.reroutes else ():
        names = [module.expert(number)[-1] for number in range(module.count)]
        forms = [each and each.form for each in map(plan.assignments.get, names)]
        kept = tuple(number for number, form in enumerate(forms) if form != DROPPED)
        if len(kept) < module.count:
            found |= dict.fromkeys(module.router, kept)
    return found


def _router(tensor: StoredTensor, dtype: str, experts: tuple[int, ...]) -> TensorSpec:
    """The rows of a router's tensor that are for these experts."""
    return TensorSpec(
        name=tensor.name,
        dtype=dtype,
        shape=(len(experts), *tensor.shape[1:]),
        part=ROUTER,
        source=tensor.disk_name,
        experts=experts,
    )


def _guard(experts: ExpertsModule) -> TensorSpec:
    return TensorSpec(
        name=f"{experts.name}.{experts.guard}",
        dtype="int32",
        shape=(len(experts.parts), experts.count),
        part=GUARD,
        source=experts.name,
    )


def make_guard(guard: TensorSpec, tensors: Iterable[TensorSpec]) -> Tensor:
    """Make the guard of experts, int32 [parts, E], from the tensors of its file.

    A linear without any is dropped, unless a mean is of its weight too.
    """
    (parts, count), prefix = guard.shape, f"{guard.source}."
    present = PARTS[-parts:]
    entries = {f"{prefix}{each}.{part}": GONE for each in range(count) for part in present}
    for tensor in tensors:
        if tensor.name.startswith(prefix) and tensor.part != GUARD:
            expert, part, _ = tensor.name.removeprefix(prefix).split(".", 2)
            linear = f"{prefix}{expert}.{part}"
            entries[linear] = max(entries[linear], tensor.rank)
        entries |= dict.fromkeys(tensor.members, 0)
    return guard_values(entries, guard.source, present, experts=count)


def compresses_experts(survey: Survey, forms: Mapping[str, StoredForm]) -> bool:
    """Test if a linear of an expert is not dense, so that all experts have modules of their own."""
    names = (names for each in survey.experts for names in each.linears().values())
    return any(name in forms for part in names for name in part)


def forms_fields(
    survey: Survey, forms: Mapping[str, StoredForm], *, reroutes: bool
) -> dict[str, Any]:
    """Return the fields of `quantization_config` with the format and all forms."""
    experts = survey.experts if compresses_experts(survey, forms) else ()
    linears = {each.name: each.linears() for each in experts}
    return write_forms(forms, linears, reroutes=reroutes)


def stored_forms(survey: Survey, plan: Plan) -> dict[str, StoredForm]:
    """Form and size of every linear that does not stay dense, in survey order.

    Raises:
        ValueError: The plan names no linear of the model, or gives one a form that it cannot have
            (a part that the form lacks or misses, a basis that is no other linear's own) or that
            saves nothing.
    """
    linears = {linear.name: linear for linear in survey.compressible}
    for name, assignment in plan.assignments.items():
        if name not in linears:
            raise ValueError(f"plan: no linear {name!r} in {survey.architecture}")
        if assignment.form == "dense" and assignment != Assignment(form="dense"):
            raise ValueError(f"plan: {name} is {assignment}; a dense linear has nothing else")
    forms = {
        name: _stored_form(linear, plan.assignments[name])
        for name, linear in linears.items()
        if name in plan.assignments and plan.assignments[name].form != "dense"
    }
    sizes = {name: (linears[name].out_features, linears[name].in_features) for name in forms}
    for name, reason in misfits(forms, sizes):
        raise ValueError(f"plan: {name}: {reason}; give it another form or keep it dense instead")
    for module in survey.experts:
        for number in range(module.count):
            names = module.expert(number)
            if len({name in forms and forms[name].form == DROPPED for name in names}) > 1:
                raise ValueError(
                    f"plan: {module.name}.{number} is dropped in part; drop all of its linears"
                )
    return forms


def _stored_form(linear: Linear, assignment: Assignment) -> StoredForm:
    return StoredForm(
        form=assignment.form,
        rank=assignment.rank,
        nonzeros=assignment.nonzeros,
        index=FORM_SIZES[assignment.form].index_code(linear, assignment),
        basis=assignment.basis,
    )


def _stored_specs(
    linear: Linear, form: StoredForm, dtype: str, tied: Sequence[str]
) -> list[TensorSpec]:
    """The tensors that stand in the place of a linear's dense weight.

    Args:
        tied: Names of the linear and of those that use a tensor of it.
    """
    tensors = FORMS[form.form].tensors(form, linear.out_features, linear.in_features)
    return [
        TensorSpec(
            name=f"{linear.name}.{tensor.name}",
            dtype=dtype if tensor.dtype is None else dtype_name(tensor.dtype),
            shape=tensor.shape,
            part=tensor.part,
            source=linear.name,
            rank=form.rank,
            nonzeros=form.nonzeros,
            code=tensor.code,
            members=tuple(tied) if tensor.part == MEAN else (),
        )
        for tensor in tensors
    ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
