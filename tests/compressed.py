"""Compressed checkpoints made without the pipeline: every linear cut by a plain SVD."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.checkpoint import FileSpec, TensorSpec, finish, layout, write_file
from orchestrator.models.output import claim_out
from orchestrator.models.skeleton import Skeleton
from orchestrator.plan import Assignment, Plan, Survey

TOKENS = torch.arange(3, 23)[None] * 3 % 96


@dataclass(frozen=True)
class Compressed:
    """A compressed checkpoint and everything that it was made of."""

    dense: Path
    directory: Path
    survey: Survey
    plan: Plan
    files: tuple[FileSpec, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]]


def half_plan(survey: Survey) -> Plan:
    """Half of the break-even rank everywhere, but for the very last linear, which stays dense."""
    assignments = {
        linear.name: Assignment(form="low_rank", rank=linear.break_even // 2)
        for linear in survey.linears[:-1]
    }
    assignments[survey.linears[-1].name] = Assignment(form="dense")
    stored = sum(assignments[each.name].stored_values(each) for each in survey.linears)
    return Plan(assignments=assignments, budget_values=stored, stored_values=stored)


def compress(
    dense: Path,
    out: Path,
    *,
    max_shard_bytes: int = 10**9,
    output_dtype: torch.dtype | None = None,
) -> Compressed:
    """Writes `out` from the dense checkpoint, file by file, as the workers do."""
    skeleton = Skeleton.open(dense)
    survey, plan = skeleton.survey(), half_plan(skeleton.survey())
    files = layout(
        survey,
        skeleton.tensors(),
        plan,
        output_dtype=output_dtype,
        max_shard_bytes=max_shard_bytes,
    )
    factors = cut(dense, plan)

    def read(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return skeleton.weights.read(spec.source)
        return factors[spec.source][spec.part == "down"]

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
        bootstrap=bootstrap_source(survey.architecture),
    )
    return Compressed(dense, out, survey, plan, files, factors)


def cut(dense: Path, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors [O, R] and [R, I] of every low-rank linear of the plan."""
    modules = dict(AutoModelForCausalLM.from_pretrained(dense).named_modules())
    factors = {}
    for name, assignment in plan.assignments.items():
        if assignment.form == "low_rank":
            weight = modules[name].weight.detach()
            weight_OI = weight.T if isinstance(modules[name], Conv1D) else weight
            u_OK, _, _ = torch.linalg.svd(weight_OI.double(), full_matrices=False)
            u_OR = u_OK[:, : assignment.rank]
            down_RI = u_OR.T @ weight_OI.double()
            factors[name] = u_OR.to(weight.dtype).contiguous(), down_RI.to(weight.dtype)
    return factors


def reference(compressed: Compressed) -> PreTrainedModel:
    """The dense model with two plain linears in the place of every low-rank one."""
    model = AutoModelForCausalLM.from_pretrained(compressed.dense)
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


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits
