"""Tiny checkpoints with compressed experts, written without the pipeline from random forms."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe.families import make_moe
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.experts.layout import ExpertsLayout
from orchestrator.models.experts.replace import find_experts
from orchestrator.models.forms.base import FormLinear, StoredForm
from orchestrator.models.forms.config import METHOD, read_forms, write_forms
from orchestrator.models.forms.guards import experts_of, guard_entry, guard_values, without_prefix
from orchestrator.models.forms.index_codes import encode
from orchestrator.models.forms.install import install_forms
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.models.forms.sparse import SparseLinear

KINDS = (
    None,
    StoredForm(form="low_rank", rank=5),
    StoredForm(form="pivoted", rank=4),
    StoredForm(form="low_rank", rank=1),
    StoredForm(form="sparse", nonzeros=60, index="positions"),
    StoredForm(form="low_rank_sparse", rank=2, nonzeros=20, index="bitmask"),
    StoredForm(form="low_rank", rank=3),
)
"""Forms of the linears of experts in turn; None: dense."""


@dataclass(frozen=True)
class MadeMoe:
    """Checkpoint with compressed experts, and the model that it was written from."""

    directory: Path
    model: PreTrainedModel
    forms: Mapping[str, StoredForm]


def some_forms(layouts: Mapping[str, ExpertsLayout]) -> dict[str, StoredForm]:
    """Return forms of the linears of all experts, each kind in every module.

    The gates of two experts of a module share a basis of inputs, the downs of two one of outputs,
    and another expert is dropped.
    """
    by_module = expert_names(layouts).values()
    names = [name for parts in by_module for each in parts.values() for name in each]
    pairs = zip(names, itertools.cycle(KINDS), strict=False)
    forms = {name: kind for name, kind in pairs if kind is not None}
    for module in layouts:
        basis = f"{module}.1.gate"
        forms[basis] = StoredForm(form="low_rank", rank=6)
        forms[f"{module}.3.gate"] = StoredForm(form="low_rank", rank=6, basis=basis)
        written = f"{module}.0.down"
        forms[written] = StoredForm(form="output_basis", rank=7)
        forms[f"{module}.3.down"] = StoredForm(form="output_basis", rank=7, basis=written)
        gone = (f"{module}.2.{part}" for part in ("gate", "up", "down"))
        forms |= dict.fromkeys(gone, StoredForm(form="dropped"))
    return forms


def expert_names(layouts: Mapping[str, ExpertsLayout]) -> dict[str, dict[str, list[str]]]:
    """Return the names of the linears of experts, by module and part."""
    return {
        module: {
            part: [f"{module}.{e}.{part}" for e in range(layout.num_experts)]
            for part in layout.parts
        }
        for module, layout in layouts.items()
    }


def moe_config(
    model: PreTrainedModel, forms: Mapping[str, StoredForm] | None = None
) -> dict[str, Any]:
    """Return the `quantization_config` for a model as its class builds it."""
    layouts = find_experts(model)
    forms = some_forms(layouts) if forms is None else forms
    return {"quant_method": METHOD, **write_forms(forms, expert_names(layouts))}


@torch.no_grad()
def fill(model: PreTrainedModel) -> None:
    """Give the forms of a model random values and valid indices, and tie shared bases."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, FormLinear):
            for parameter in module.parameters():
                parameter.normal_(std=0.3, generator=generator)
        if isinstance(module, PivotedLinear):
            module.index.copy_(torch.randperm(module.out_features, generator=generator))
        if isinstance(module, SparseLinear):
            sizes = module.out_features, module.in_features
            chosen = torch.randperm(sizes[0] * sizes[1], generator=generator)[: module.nonzeros]
            for name, tensor in encode(module.code, chosen.sort().values, *sizes).items():
                module.get_buffer(name).copy_(tensor)
    for name, source in model.all_tied_weights_keys.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, model.get_parameter(source))


def store_moe(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> MadeMoe:
    """Write a family's checkpoint with random forms of its experts."""
    model = make_moe(family, dtype)
    config = moe_config(model)
    install_forms(model, config)
    fill(model)
    forms = read_forms(config)
    ranks = {without_prefix(model, name): guard_entry(form) for name, form in forms.items()}
    for name, experts in experts_of(model).items():
        parts, count = experts.layout.parts, experts.num_experts
        guard = guard_values(ranks, name, parts, experts=count)
        experts.get_buffer(experts.layout.fused_name("up", "weight")).copy_(guard)
    directory.mkdir(parents=True)
    tied = set(model.all_tied_weights_keys)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    architecture = type(model).__name__
    module = "modeling_orchestrator"
    content = {
        **model.config.to_dict(),
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"{module}.{type(model.config).__name__}",
            "AutoModelForCausalLM": f"{module}.{architecture}",
        },
        "quantization_config": config,
    }
    (directory / "config.json").write_text(json.dumps(content, default=str))
    (directory / f"{module}.py").write_text(bootstrap_source(architecture))
    return MadeMoe(directory, model, forms)


def changed_moe(made: MadeMoe, directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Make a copy of the checkpoint with another config."""
    for path in made.directory.iterdir():
        (directory / path.name).symlink_to(path)
    config = json.loads((made.directory / "config.json").read_bytes())
    change(config)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Assert equal logits up to 1e-6 of the largest one.

    Products of a few rows have other bits where a tensor of a file lies at another place in memory.
    """
    tolerance = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
