"""Compressed checkpoints made without the pipeline: plain SVDs and largest entries."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import VOCABULARY
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.linalg.pivot import pivot
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec, layout
from orchestrator.models.checkpoint.output import claim_out
from orchestrator.models.checkpoint.write import finish, write_file
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.forms.index_codes import encode
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.forms import AFFINE, LOW_RANK
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Assignment, Plan

TOKENS = torch.arange(3, 23)[None] * 3 % 96


def some_chunks(count: int) -> list[Chunk]:
    """Make chunks of two sequences of 12 tokens, each with more padding than the one before."""
    generator = torch.Generator().manual_seed(3)
    chunks = []
    for index in range(count):
        tokens_BT = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
        mask_BT = torch.ones(2, 12, dtype=torch.bool)
        mask_BT[1, 11 - index :] = False
        chunks.append(Chunk(index, tokens_BT * mask_BT, mask_BT))
    return chunks


@dataclass(frozen=True)
class Compressed:
    """Compressed checkpoint with everything that it was made from."""

    dense: Path
    directory: Path
    survey: Survey
    plan: Plan
    files: tuple[FileSpec, ...]
    parts: Mapping[str, Mapping[str, Tensor]]
    """Tensors of every linear that is not dense: `weight` and `down`, their pivoted form or their
    `bias`; `values` and `positions`."""

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (part["weight"], part["down"]) for name, part in self.parts.items()}

    def dense_weight(self, name: str) -> Tensor:
        """Compute the weight [O, I] that a linear's tensors represent, in float64, by
        definition."""
        linear = next(each for each in self.survey.linears if each.name == name)
        weight_OI = torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64)
        parts = self.parts[name]
        if "weight" in parts:
            weight_OI += parts["weight"].double() @ parts["down"].double()
        if "values" in parts:
            weight_OI.view(-1)[parts["positions"]] += parts["values"].double()
        return weight_OI


def half_plan(survey: Survey) -> Plan:
    """Plan half of the break-even rank for every linear except the last one, which stays dense."""
    assignments = {
        linear.name: Assignment(form="low_rank", rank=LOW_RANK.break_even(linear) // 2)
        for linear in survey.linears[:-1]
    }
    assignments[survey.linears[-1].name] = Assignment(form="dense")
    return plan_of(survey, assignments)


def mixed_plan(survey: Survey) -> Plan:
    """Plan every form, and every index code for which a linear is wide enough.

    The first linear of blocks 0 and 1, and of blocks 2 and 3, share a basis; the others take the
    forms in turn, sparse ones with few entries, with some, and with nearly half of them.
    """
    assignments = {}
    for block in range(survey.num_blocks):
        for turn, linear in enumerate(survey.of_block(block)):
            assignments[linear.name] = _assignment_in_turn(linear, 2 * block + turn)
    firsts = [survey.of_block(block)[0] for block in range(survey.num_blocks)]
    for one, two in zip(firsts[::2], firsts[1::2], strict=True):
        rank = LOW_RANK.break_even(one) + 1  # more than either could have alone
        assignments[one.name] = Assignment(form="low_rank", rank=rank)
        assignments[two.name] = Assignment(form="low_rank", rank=rank, basis=one.name)
    return plan_of(survey, assignments)


def _assignment_in_turn(linear: Linear, turn: int) -> Assignment:
    half = linear.values // 2 - 5
    some = 5 * linear.out_features // 2
    return (
        Assignment(form="sparse", nonzeros=half),
        Assignment(form="low_rank_sparse", rank=LOW_RANK.break_even(linear) // 3, nonzeros=some),
        Assignment(form="sparse", nonzeros=some),
        Assignment(form="low_rank", rank=LOW_RANK.break_even(linear) // 2),
        Assignment(form="low_rank_sparse", rank=1, nonzeros=3),
        Assignment(form="pivoted", rank=LOW_RANK.break_even(linear) + 1),
        Assignment(form="dense"),
    )[turn % 7]


def affine_plan(survey: Survey) -> Plan:
    """Plan half of the break-even rank, and a bias, for every linear."""
    assignments = {
        linear.name: Assignment(form="affine", rank=AFFINE.break_even(linear) // 2)
        for linear in survey.linears
    }
    return plan_of(survey, assignments)


def plan_of(survey: Survey, assignments: Mapping[str, Assignment]) -> Plan:
    linears = {linear.name: linear for linear in survey.linears}
    stored = sum(each.stored_values(linears[name]) for name, each in assignments.items())
    return Plan(assignments=assignments, budget_values=stored, stored_values=stored)


def compress(
    dense: Path,
    out: Path,
    *,
    make_plan: Callable[[Survey], Plan] = half_plan,
    max_shard_bytes: int = 10**9,
    output_dtype: torch.dtype | None = None,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Compressed:
    """Write `out` from the dense checkpoint, file by file, like the workers.

    Args:
        parts: Stored tensors of every linear that is not dense; None: those that `cut` makes.
    """
    lazy_model = LazyModel.open(dense)
    survey, plan = lazy_model.survey(), make_plan(lazy_model.survey())
    files = layout(
        survey,
        lazy_model.tensors(),
        plan,
        output_dtype=output_dtype,
        max_shard_bytes=max_shard_bytes,
    )
    parts = cut(dense, survey, plan) if parts is None else parts
    linears = {linear.name: linear for linear in survey.linears}

    def read(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return lazy_model.weights.read(spec.source)
        if spec.part in parts[spec.source]:
            return parts[spec.source][spec.part]
        linear = linears[spec.source]
        sizes = linear.out_features, linear.in_features
        return encode(spec.code, parts[linear.name]["positions"], *sizes)[spec.part]

    claim_out(out)
    for file in files:
        write_file(FileSpec.from_json(file.to_json()), out / file.name, read)
    finish(
        out,
        dense=dense,
        survey=survey,
        plan=plan,
        files=files,
        base_model="someone/tiny",
        output_dtype=output_dtype,
        recipe="keep = 0.5\n",
        report={"version": 1},
        bootstrap=bootstrap_source(survey.architecture, plan.forms),
    )
    return Compressed(dense, out, survey, plan, files, parts)


def cut(dense: Path, survey: Survey, plan: Plan) -> dict[str, dict[str, Tensor]]:
    """Return the stored tensors of every linear that is not dense."""
    modules = dict(with_experts(dense).named_modules())
    groups: dict[str, list[str]] = {}
    for linear in survey.linears:
        assignment = plan.assignments.get(linear.name, Assignment(form="dense"))
        if assignment.form != "dense":
            groups.setdefault(assignment.basis or linear.name, []).append(linear.name)
    parts = {}
    for first, names in groups.items():
        weights = [_weight(modules[name]) for name in names]
        for name, stored in zip(names, _cut(weights, plan.assignments[first]), strict=True):
            dtype = modules[name].weight.dtype
            parts[name] = {
                part: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for part, tensor in stored.items()
            }
    return parts


def _weight(module: nn.Module) -> Tensor:
    """Return the weight [O, I] in float64."""
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


def _cut(weights: list[Tensor], assignment: Assignment) -> list[dict[str, Tensor]]:
    """Compute factors of the stacked weights, and the largest entries of the remainder."""
    tall_OI = torch.cat(weights)
    parts: list[dict[str, Tensor]] = [{} for _ in weights]
    if assignment.rank:
        u_OK, _, _ = torch.linalg.svd(tall_OI, full_matrices=False)
        u_OR = u_OK[:, : assignment.rank]
        down_RI = u_OR.T @ tall_OI
        for part, rows_OR in zip(parts, u_OR.split([len(each) for each in weights]), strict=True):
            part |= {"weight": rows_OR.contiguous(), "down": down_RI}
        if assignment.form == "affine":
            parts[0] |= {"bias": tall_OI.sum(dim=1)}
        if assignment.form == "pivoted":
            found = pivot(u_OR, down_RI)
            parts[0] |= {"others": found.weight_SR, "pivots": found.down_RI}
            parts[0] |= {"order": found.order_O}
        tall_OI = tall_OI - u_OR @ down_RI
    if assignment.nonzeros:
        rest_E = tall_OI.flatten()
        positions_N = rest_E.abs().topk(assignment.nonzeros).indices.sort().values
        parts[0] |= {"values": rest_E[positions_N], "positions": positions_N}
    return parts


def with_experts(dense: Path) -> PreTrainedModel:
    """Load a dense checkpoint with a module for each linear of an expert, if it has experts."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    replace_experts(model)
    return model


def reference(compressed: Compressed) -> PreTrainedModel:
    """Make the dense model with two plain linears instead of each low-rank one."""
    model = with_experts(compressed.dense)
    for name, (weight_OR, down_RI) in compressed.factors.items():
        bias = model.get_submodule(name).bias
        down = nn.Linear(*down_RI.shape[::-1], bias=False)
        up = nn.Linear(*weight_OR.shape[::-1], bias=bias is not None)
        down.weight, up.weight = nn.Parameter(down_RI), nn.Parameter(weight_OR)
        if bias is not None:
            up.bias = bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(down, up))
    return model.eval()


def dense_reference(compressed: Compressed) -> PreTrainedModel:
    """Make the dense model with the weights that the forms represent."""
    model = with_experts(compressed.dense)
    for name in compressed.parts:
        module, weight_OI = model.get_submodule(name), compressed.dense_weight(name)
        weight = weight_OI.T if isinstance(module, Conv1D) else weight_OI
        module.weight = nn.Parameter(weight.to(module.weight.dtype))
        if "bias" in compressed.parts[name]:
            module.bias = nn.Parameter(compressed.parts[name]["bias"])
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def changed(made: Compressed, tmp_path: Path, change: Callable[[Any], None]) -> Path:
    """Make a copy of the checkpoint with other modules in its config."""
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((made.directory / "config.json").read_bytes())
    change(config["quantization_config"]["modules"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def close_to(reference: Tensor) -> dict[str, float]:
    """Tolerance of a comparison, 1e-5 of the largest value."""
    return {"rtol": 0, "atol": 1e-5 * float(reference.abs().max())}
