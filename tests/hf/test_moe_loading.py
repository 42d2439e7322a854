"""Loading checkpoints with compressed experts with stock transformers: all nine families."""

import ast
from collections import Counter

import pytest
import torch
from compressed import TOKENS, logits
from moe.families import MOE_FAMILIES
from moe.stored import assert_same, changed_moe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from orchestrator.errors import InputError
from orchestrator.hf import load
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.forms import guards
from orchestrator.models.forms.base import FormLinear

GUARD = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def made_moe(stored_moe):
    """A tiny Qwen3-MoE with compressed experts; not to be changed."""
    return stored_moe("qwen3_moe")


def names_in(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_loads_saves_and_generates(family, stored_moe, tmp_path):
    """Logits are those of the model that was written, no key is missing or unexpected, and saving
    keeps the names."""
    made = stored_moe(family)
    expected = logits(made.model)
    model, info = AutoModelForCausalLM.from_pretrained(made.directory, output_loading_info=True)
    assert not any(info.values()), info
    assert {n for n, m in model.named_modules() if isinstance(m, FormLinear)} >= made.forms.keys()
    assert_same(logits(model), expected)
    generated = model.generate(TOKENS, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert generated[0, TOKENS.shape[1]] == expected[0, -1].argmax()
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(made.directory)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(logits(again), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_a_program_without_the_format_stops(family, stored_moe, tmp_path):
    """The guard has another shape than the tensor of all experts, which no program can make up."""
    made = stored_moe(family)
    native = changed_moe(made, tmp_path, lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(native)


def test_the_body_loads_without_the_head(made_moe):
    """AutoModel finds experts although their names lack the prefix."""
    whole = AutoModelForCausalLM.from_pretrained(made_moe.directory).model
    body = AutoModel.from_pretrained(made_moe.directory)
    with torch.no_grad():
        assert_same(body(TOKENS).last_hidden_state, whole(TOKENS).last_hidden_state)


def test_blocks_can_lie_on_disk(made_moe, tmp_path):
    """Experts and their guard are fetched from disk for the forward pass."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        made_moe.directory, device_map=places, offload_folder=tmp_path
    )
    assert model.model.layers[3].mlp.experts.get_submodule("0.up").weight.is_meta
    assert_same(logits(model), logits(made_moe.model))


def test_a_guard_stays_whole_numbers_in_16_bits(stored_moe, tmp_path):
    """Loading, casting and saving in bfloat16 change the values of experts, not the ranks."""
    made = stored_moe("gpt_oss")
    model = AutoModelForCausalLM.from_pretrained(made.directory, dtype=torch.bfloat16)
    guard = model.model.layers[0].mlp.experts.gate_up_proj
    assert guard.dtype == torch.int32
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[GUARD], guard)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ranks = {name: guards.guard_entry(form) for name, form in made.forms.items()}
    module = GUARD.rpartition(".")[0]
    expected = [
        [ranks.get(f"{module}.{expert}.{part}", 0) for expert in range(4)]
        for part in ("gate", "up", "down")
    ]
    assert guard.tolist() == expected


def test_another_guard_stops_the_load(made_moe, tmp_path):
    """Files of a checkpoint with other ranks, here of an expert that is dense in the config."""
    copy = changed_moe(made_moe, tmp_path, lambda config: None)
    tensors = load_file(copy / "model.safetensors")
    tensors[GUARD][0, 0] += 1
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="experts: the ranks that are stored with the experts are"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_guard_that_is_not_stored_is_missed(made_moe, tmp_path):
    """`load` says so before anything is loaded."""
    copy = changed_moe(made_moe, tmp_path, lambda config: None)
    assert_same(logits(load(copy)), logits(made_moe.model))
    tensors = load_file(copy / "model.safetensors")
    del tensors[GUARD]
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"not stored: {GUARD}"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda experts: experts.pop("model.layers.2.mlp.experts"), "layers.2.* is missing, an"),
        (lambda experts: experts.update({"model.layers.2.mlp": {}}), "layers.2.mlp' is no experts"),
        (
            lambda experts: experts["model.layers.0.mlp.experts"]["up"].update(
                form="low_rank", index="", nonzeros=0, rank=[1, 2, 3, 4, 5]
            ),
            "experts.4.up.*found no such module",
        ),
    ],
)
def test_a_config_that_does_not_fit_stops_the_load(made_moe, tmp_path, change, message):
    """Experts of the config are those of the model: all of its modules, and each expert."""
    copy = changed_moe(
        made_moe, tmp_path, lambda config: change(config["quantization_config"]["experts"])
    )
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def test_names_that_loading_would_change_are_refused(made_moe):
    """Names of the families are converted to fused tensors, the stored ones are not."""
    names = [f"model.layers.0.mlp.experts.0.{part}.weight" for part in ("gate", "up", "down")]
    guards.check_names(made_moe.model, names)
    with pytest.raises(InputError, match=r"load model.layers.0.mlp.experts.3.up_proj.weight as"):
        guards.check_names(made_moe.model, ["model.layers.0.mlp.experts.3.up_proj.weight"])


def test_the_bootstrap_has_no_name_twice():
    """Its files are joined, so that a second definition would replace the first."""
    tree = ast.parse(bootstrap_source("Qwen3MoeForCausalLM"))
    kinds = ast.FunctionDef | ast.ClassDef
    names = [each.name for each in tree.body if isinstance(each, kinds)]
    for each in tree.body:
        targets = each.targets if isinstance(each, ast.Assign) else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert "Experts" in names
    assert [name for name, count in Counter(names).items() if count > 1] == []
