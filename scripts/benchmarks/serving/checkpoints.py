"""Checkpoints to measure: a dense one, and compressed ones with random factors in uniform ranks.

Shape suffixes: O outputs, R rank.
"""

import shutil
from pathlib import Path

import torch
from benchmarks.common.synthetic import config_of, write_model
from torch import Tensor

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.uniform import Uniform
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.checkpoint.layout import TensorSpec, layout
from orchestrator.models.checkpoint.output import claim_out
from orchestrator.models.checkpoint.write import finish, write_file
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.forms import LOW_RANK, PIVOTED

SIZES = {"blocks": 4, "hidden": 2048, "intermediate": 5632}
KEPT = (0.8, 0.6)
FORMS = {"low-rank": LOW_RANK, "pivoted": PIVOTED}
DEVIATION = 0.02
"""Standard deviation of values, with which activations neither vanish nor grow."""


def variants() -> list[str]:
    """Return the names of the compressed checkpoints, `pivoted-0.8`."""
    return [f"{form}-{kept}" for kept in KEPT for form in FORMS]


def make_all(dense: Path, work: Path) -> dict[str, Path]:
    """Write the compressed checkpoints of a dense one, unless they are there; by name."""
    made = {"dense": dense}
    for name in variants():
        made[name] = work / name
        if not (made[name] / "config.json").exists():
            # an attempt that was stopped
            shutil.rmtree(made[name], ignore_errors=True)
            compress_at_random(dense, made[name], name)
    return made


def synthetic(directory: Path) -> Path:
    """Write the dense model of width 2048, unless it is there."""
    if not (directory / "config.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write_model(directory, config_of(**SIZES))
    return directory


def compress_at_random(dense: Path, out: Path, name: str) -> None:
    """Write a checkpoint with the ranks of a kept fraction, and random values.

    Args:
        name: Form and kept fraction, `pivoted-0.8`.
    """
    form, _, kept = name.rpartition("-")
    model = LazyModel.open(dense)
    survey = model.survey()
    budget = Budget(float(kept), FORMS[form], multiple="auto")
    plan = Uniform()(survey.linears, {}, budget, {})
    generator = torch.Generator().manual_seed(0)

    def read(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return model.weights.read(spec.source)
        if spec.part == "order":
            return order(spec.shape[0], spec.rank, generator)
        return torch.randn(spec.shape, generator=generator) * DEVIATION

    files = layout(
        survey, model.tensors(), plan, output_dtype=torch.bfloat16, max_shard_bytes=10**10
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    claim_out(out)
    for file in files:
        write_file(file, out / file.name, read)
    finish(
        out,
        dense=dense,
        survey=survey,
        plan=plan,
        files=files,
        base_model=dense.name,
        output_dtype=torch.bfloat16,
        recipe=f"keep = {kept}\n",
        report={"version": 1},
        bootstrap=bootstrap_source(survey.architecture, plan.forms),
    )


def order(outputs: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return the places of outputs among random pivots and the others, both in order, int32."""
    is_pivot_O = torch.zeros(outputs, dtype=torch.bool)
    is_pivot_O[torch.randperm(outputs, generator=generator)[:rank]] = True
    places_O = torch.empty(outputs, dtype=torch.int32)
    places_O[is_pivot_O] = torch.arange(rank, dtype=torch.int32)
    places_O[~is_pivot_O] = torch.arange(rank, outputs, dtype=torch.int32)
    return places_O
