"""A checkpoint of experts shows one tensor for each matrix, whatever its layout on disk."""

import pytest
import torch
from moe.families import MOE_FAMILIES, make_moe
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.core_model_loading import Interleave, MergeModulelist, WeightConverter

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.survey import expert_weights
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.expert_weights import ExpertWeights, view_experts
from orchestrator.models.survey.names import map_names


def opened(directory):
    """Architecture with a module for each linear of an expert, and the view of its checkpoint."""
    architecture = Architecture.read(directory)
    return architecture, view_experts(Weights.open(directory), architecture)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_view_has_the_tensors_of_the_modules(family, moe_checkpoint):
    """Every tensor of the model with split experts is there by its name: values, shape, dtype.

    The memory order too, which decides the bits of products.
    """
    architecture, weights = opened(moe_checkpoint(family))
    model = make_moe(family)
    replace_experts(model)
    built = architecture.build(torch.float32, stored=len(weights.names))
    names = map_names(built, weights)
    assert names.disk.keys() == model.state_dict().keys()
    assert names.unused == ()
    for name, tensor in model.state_dict().items():
        disk_name = names.disk[name]
        assert disk_name == name or ".experts." not in name
        found = weights.read(disk_name)
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
        assert (weights.shape(disk_name), weights.dtype(disk_name)) == (found.shape, found.dtype)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_names_of_linears_are_changed_by_no_rule_of_the_family(family, moe_checkpoint):
    """A checkpoint that stores the tensors under their module names maps to the same names."""
    architecture, weights = opened(moe_checkpoint(family))
    built = architecture.build(torch.float32, stored=len(weights.names))
    experts = [name for name in built.state_dict() if ".experts." in name]
    assert experts
    names = map_names(built, weights)
    assert [names.disk[name] for name in experts] == experts


READ = {
    ("qwen3_moe", "gate"): 1,
    ("granitemoe", "gate"): 1,
    ("granitemoe", "up"): 1,
    ("gpt_oss", "up"): 2,
    ("gpt_oss", "down"): 1,
    ("llama4", "gate"): 2,
}
"""Bytes read for a matrix, in units of its size: twice where gate and up are in the same rows."""


@pytest.mark.parametrize(("family", "part"), READ)
def test_a_matrix_is_read_by_its_own_bytes(family, part, moe_checkpoint, monkeypatch):
    """Only the entry of one expert is read of a tensor of all."""
    _, weights = opened(moe_checkpoint(family))
    name = next(n for n in weights.names if n.endswith(f".experts.2.{part}.weight"))
    expected = weights.read(name)
    sizes = []
    read = Weights._read

    def record(self, name, entry, device):
        sizes.append(entry.size_bytes)
        return read(self, name, entry, device)

    monkeypatch.setattr(Weights, "_read", record)
    assert torch.equal(weights.read(name), expected)
    assert sizes == [READ[family, part] * expected.nbytes]
    weights.read_ahead([name])


def test_a_dense_model_has_no_view(checkpoint):
    """The tensors are those on disk, and no model is built to find that out."""
    _, weights = opened(checkpoint("llama"))
    assert isinstance(weights, Weights)


def changed(directory, to, change):
    """Copy a checkpoint with other tensors."""
    to.mkdir()
    (to / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), to / "model.safetensors")
    return to


def test_experts_of_other_shapes_are_refused(moe_checkpoint, tmp_path):
    """One expert less on disk: the message has both shapes."""
    name = "model.layers.1.mlp.experts.down_proj"

    def cut(tensors):
        return tensors | {name: tensors[name][:3].contiguous()}

    directory = changed(moe_checkpoint("gpt_oss"), tmp_path / "cut", cut)
    with pytest.raises(InputError, match=rf"{name} has shape \[3, 48, 32\].*has \[4, 48, 32\]"):
        opened(directory)


def test_a_missing_expert_is_named(moe_checkpoint, tmp_path):
    """A matrix that is not stored is named as the module's."""
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def drop(tensors):
        return {key: tensor for key, tensor in tensors.items() if key != name}

    architecture, weights = opened(changed(moe_checkpoint("olmoe"), tmp_path / "less", drop))
    model = architecture.build(torch.float32, stored=len(weights.names))
    with pytest.raises(InputError, match=r"not stored: model.layers.1.mlp.experts.3.up.weight$"):
        map_names(model, weights)


TEXT = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "depth": 1}


@pytest.mark.parametrize("is_turned", [False, True])
def test_matrices_may_be_stored_in_the_other_order(is_turned, tmp_path):
    """Qwen3-VL-MoE has tensors of [E, inputs, outputs] on disk, or [E, outputs, inputs] as in
    memory; the view is the same."""
    text = TEXT | {
        "num_experts": 3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = VISION | {"out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    model = Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in tensors:
        if is_turned and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    tensors.pop("lm_head.weight", None)
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = ExpertWeights(Weights.open(tmp_path), model.to("meta"))
    names = [name for name in weights.names if ".experts." in name]
    assert len(names) == 2 * 3 * 3
    prefix = "model.language_model.layers.1.mlp.experts"
    fused = load_file(tmp_path / "model.safetensors")[f"{prefix}.gate_up_proj"]
    fused = fused.transpose(1, 2) if is_turned else fused
    up = weights.read(f"{prefix}.2.up.weight")
    assert torch.equal(up, fused[2, 12:])


def test_other_conversions_are_refused(moe_checkpoint, monkeypatch):
    """Experts that a family stores as halves of each matrix, say; the operations are named."""
    rule = WeightConverter(
        source_patterns=["experts.*.up_proj.weight", "experts.*.gate_proj.weight"],
        target_patterns="experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Interleave(dim=1)],
    )
    monkeypatch.setattr(expert_weights, "get_model_conversion_mapping", lambda model: [rule])
    with pytest.raises(InputError, match=r"stored in another layout .*\(MergeModulelist, Inter"):
        opened(moe_checkpoint("qwen3_moe"))
