"""Loading compressed checkpoints with stock transformers."""

import ast
import json
import sys

import pytest
import torch
from compressed import TOKENS, logits, reference
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import orchestrator.hf
from orchestrator.errors import InputError
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.forms.low_rank import LowRankLinear


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_exactly(family, halved):
    """The logits are bit for bit those of the dense model with the factors put in by hand."""
    made = halved(family)
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)} == set(
        made.factors
    )
    assert torch.equal(logits(model), logits(reference(made)))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_no_logit(made, expected, device_map):
    """Several files are dispatched and give the same logits."""
    model = AutoModelForCausalLM.from_pretrained(made.directory, device_map=device_map)
    assert torch.equal(logits(model), expected)


def test_blocks_can_lie_on_disk(made, expected, tmp_path):
    """Factors are offloaded like any weight, and fetched for the forward pass."""
    places = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    places |= {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
    places["model.rotary_emb"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        made.directory, device_map=places, offload_folder=tmp_path
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert model.model.layers[1].self_attn.q_proj.down.weight.is_meta
    assert torch.equal(logits(model), expected)


def test_saving_and_loading_again_changes_nothing(made, expected, tmp_path):
    """`save_pretrained` keeps the forms, in files of another size; architectures stay native."""
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "config.json").read_bytes())
    before = json.loads((made.directory / "config.json").read_bytes())
    assert config["quantization_config"] == before["quantization_config"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config  # the file that it points to is not written by a native class
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_greedy_generation_follows_the_logits(made, expected):
    """`generate` runs with its cache, and its first token is the most likely one."""
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape[1] == TOKENS.shape[1] + 4
    assert generated[0, TOKENS.shape[1]] == expected[0, -1].argmax()


def test_factors_can_be_trained(made):
    """The model counts as trainable and both factors get gradients."""
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert model.hf_quantizer.is_trainable
    model(TOKENS, labels=TOKENS).loss.backward()
    module = model.model.layers[0].mlp.down_proj
    assert module.weight.grad.abs().sum() > 0
    assert module.down.weight.grad.abs().sum() > 0


def test_the_body_loads_without_the_head(made):
    """AutoModel finds the modules although their names lack the prefix."""
    whole = AutoModelForCausalLM.from_pretrained(made.directory).model
    body = AutoModel.from_pretrained(made.directory)
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, whole(TOKENS).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "this program reads 1 to 3; load it with"),
        ({"format_version": 2}, "experts: found None, need an object"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"form": "low_rank", "rank": 40}}}, "rank 40"),
        ({"__init__": "os.system"}, "unknown field '__init__'"),
    ],
)
def test_a_config_that_does_not_fit_stops_the_load(made, tmp_path, change, message):
    """Damage to the config surfaces as our error through from_pretrained."""
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((made.directory / "config.json").read_bytes())
    config["quantization_config"] |= change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_rank_that_is_not_the_stored_one_stops_the_load(made, tmp_path):
    """A config that contradicts the tensors gives an error, never a model."""
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((made.directory / "config.json").read_bytes())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["rank"] = 4
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_factor_is_not_made_up(made, expected, tmp_path):
    """`load` stops where from_pretrained only warns; on a sound checkpoint they agree."""
    assert torch.equal(logits(orchestrator.hf.load(made.directory)), expected)
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    first = tmp_path / made.files[0].name
    tensors = load_file(first)
    name = "model.layers.0.mlp.up_proj.down.weight"
    del tensors[name]
    first.unlink()
    save_file(tensors, first, {"format": "pt"})
    with pytest.raises(InputError, match=name):
        orchestrator.hf.load(tmp_path)


def test_it_compiles_in_one_graph(made, expected):
    """Nothing in the forms breaks a compiled graph."""
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


def test_registering_again_changes_nothing():
    """Importing twice, or after a checkpoint's own file has registered, is harmless."""
    before = AUTO_QUANTIZER_MAPPING["orchestrator"]
    orchestrator.hf.register()
    assert AUTO_QUANTIZER_MAPPING["orchestrator"] is before


def test_the_bootstrap_stands_alone(made):
    """The file in the checkpoint imports torch, transformers and the standard library only."""
    source = (made.directory / "modeling_orchestrator.py").read_text(encoding="utf-8")
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_no_config_writes_code():
    """A class name from a config is written into the file only if it is a name."""
    with pytest.raises(InputError, match="not a class name"):
        bootstrap_source("A(): pass\nimport os\nclass B")


def test_only_compressed_checkpoints_take_the_config(made):
    """Handing the config to a dense checkpoint is refused: nothing is compressed on the fly."""
    config = orchestrator.hf.OrchestratorConfig(
        quant_method="orchestrator", format_version=1, modules={}
    )
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(made.dense, quantization_config=config)
