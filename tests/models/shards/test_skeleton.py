"""Opening of a model: names on disk, tied weights, sizes, and refused checkpoints."""

import json
import shutil
import struct

import pytest
import torch
from families import FAMILIES, VOCABULARY, write_model
from safetensors.torch import load_file, save_file
from sharded import HALVES, padded_chunk, sharded_logits, whole_logits, whole_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orchestrator.errors import InputError
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.forms import LOW_RANK

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def llama(checkpoint, tmp_path):
    """A Llama checkpoint that tests may damage."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "llama")


def change_config(directory, **changes):
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised .*'gptq'"),
        ({"quantization_config": {}}, "already quantised .*None"),
        ({"quantization_config": ["x"]}, "already quantised .*None"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "already quantised"),
        ({"quantization_config": {"quant_method": "orchestrator"}}, "format_version"),
        ({"architectures": None}, "architectures is None; one class name is expected"),
        ({"architectures": ["A", "B"]}, r"architectures is \['A', 'B'\]"),
        ({"architectures": ["LlamaForProphecy"]}, "'LlamaForProphecy', which is not a model class"),
        ({"architectures": ["AutoConfig"]}, "'AutoConfig', which is not a model class"),
        ({"architectures": [7]}, "names 7, which is not a model class"),
        ({"architectures": ["GPT2LMHeadModel"]}, "does not match model_type 'llama'"),
        ({"model_type": "llama9"}, "model_type is 'llama9', unknown to transformers"),
        ({"model_type": None}, "model_type is None, unknown"),
        ({"num_hidden_layers": 5}, r"9 of 48 parameters .* not stored: model\.layers\.4\.self"),
        ({"num_hidden_layers": 0}, "no list of num_hidden_layers = 0 blocks"),
        ({"hidden_size": 64}, r"has shape \[96, 32\], .* of LlamaForCausalLM has \[96, 64\]"),
        ({"hidden_size": "wide"}, "not a valid llama config"),
        ({"num_attention_heads": 0}, r"config"),
        ({"num_key_value_heads": 4, "head_dim": 4}, "has shape"),
        ({"hidden_act": "magic"}, "does not make a LlamaForCausalLM: KeyError"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is inf; it must be"),
        ({"initializer_range": 1e39}, r"initializer_range is 1e\+39; it must be"),
    ],
)
def test_an_invalid_config_is_refused(llama, changes, message):
    """One line states the place, the value found, and what is needed."""
    change_config(llama, **changes)
    with pytest.raises(InputError, match=message) as caught:
        LazyModel.open(llama)
    assert "\n" not in str(caught.value)


def drop_norm(tensors):
    del tensors["model.layers.2.input_layernorm.weight"]


def transpose_gate(tensors):
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def round_gate(tensors):
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


def store_twice(tensors):
    tensors["layers.1.mlp.gate_proj.weight"] = tensors[
        "model.layers.1.mlp.gate_proj.weight"
    ].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_norm, r"1 of 39 parameters .* stored: model\.layers\.2\.input_layernorm\.weight$"),
        (transpose_gate, r"model\.layers\.1\.mlp\.gate_proj\.weight has shape \[32, 48\]"),
        (round_gate, r"gate_proj\.weight is stored as torch\.int8"),
        (store_twice, r"both map to model\.layers\.1\.mlp\.gate_proj\.weight"),
    ],
)
def test_invalid_tensors_are_refused(llama, change, message):
    """A parameter that is missing, stored twice, or of another shape or kind is named."""
    change_tensors(llama, change)
    with pytest.raises(InputError, match=message):
        LazyModel.open(llama)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2)
            ),
            "T5ForConditionalGeneration, an encoder-decoder model; .* such as llama, mistral",
        ),
        (lambda: BertForMaskedLM(BertConfig(**TINY)), "BertForMaskedLM; a causal language model"),
        (
            lambda: GPT2Model(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
            "GPT2Model; a causal language model is needed",
        ),
    ],
    ids=["encoder-decoder", "masked", "headless"],
)
def test_an_unsupported_model_is_refused(make, message, tmp_path):
    """Fused experts, encoders, models that do not generate, and those without a head are named."""
    with pytest.raises(InputError, match=message):
        LazyModel.open(write_model(make, tmp_path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"gate_proj\.weight has 2 NaN and 0 infinite of 1536 values"),
        (float("-inf"), r"gate_proj\.weight has 0 NaN and 2 infinite of 1536 values"),
    ],
)
def test_a_shard_refuses_its_values_that_are_not_finite(llama, value, message):
    """The shard that reads the tensor names it; others never read it, and still open."""

    def spoil(tensors):
        tensors["model.layers.1.mlp.gate_proj.weight"][3, 4:6] = value

    change_tensors(llama, spoil)
    lazy_model = LazyModel.open(llama)
    with pytest.raises(InputError, match=message):
        lazy_model.shard(range(0, 2))
    with lazy_model.shard(range(2, 4)) as shard:
        assert shard.is_last


def test_no_code_in_a_checkpoint_is_run(llama):
    """Code files, `auto_map` and kernel names of the config are ignored."""
    (llama / "evil.py").write_text("raise SystemExit('the checkpoint ran code')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(llama, auto_map=auto_map, attn_implementation="someone/kernel")
    assert LazyModel.open(llama).attention == "sdpa"


def keep_both(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def keep_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def drop_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("change", [keep_both, keep_head, drop_prefix])
def test_tied_weights_are_found_under_any_stored_name(checkpoint, tmp_path, change):
    """Stored under both names, the head's, or without the model's prefix: the same bits."""
    directory = shutil.copytree(checkpoint("llama_tied"), tmp_path / "tied")
    change_tensors(directory, change)
    lazy_model, chunk = LazyModel.open(directory), padded_chunk("right")
    expected_BTV = whole_logits(whole_model(directory, torch.float32), chunk)
    assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV)
    assert torch.equal(sharded_logits(lazy_model, chunk, [range(0, 4)]), expected_BTV)
    assert (
        lazy_model.survey().total_parameters
        == LazyModel.open(checkpoint("llama_tied")).survey().total_parameters
    )


def differ_everywhere(embeddings_VC):
    return embeddings_VC + 1


def differ_in_one_row(embeddings_VC):
    head_VC = embeddings_VC.clone()
    head_VC[VOCABULARY // 6, 3] += 1  # between the samples by which tensors are compared first
    return head_VC


@pytest.mark.parametrize("change_head", [differ_everywhere, differ_in_one_row])
def test_a_head_of_its_own_is_counted(change_head, checkpoint, tmp_path):
    """A config that ties it does not make it equal: transformers has two tables then, too."""
    directory = shutil.copytree(checkpoint("llama_tied"), tmp_path / "tied")

    def change(tensors):
        tensors["lm_head.weight"] = change_head(tensors["model.embed_tokens.weight"])

    change_tensors(directory, change)
    lazy_model, chunk = LazyModel.open(directory), padded_chunk("right")
    model = whole_model(directory, torch.float32)
    assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), whole_logits(model, chunk))
    assert lazy_model.survey().total_parameters == model.num_parameters()
    tied = LazyModel.open(checkpoint("llama_tied")).survey().total_parameters
    assert lazy_model.survey().total_parameters == tied + VOCABULARY * 32


def test_an_old_layout_is_read(checkpoint, tmp_path):
    """GPT-2 as first published, without prefix and with mask buffers: the same bits."""
    directory = shutil.copytree(checkpoint("gpt2"), tmp_path / "gpt2")

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    change_tensors(directory, age)
    lazy_model, chunk = LazyModel.open(directory), padded_chunk("right")
    expected_BTV = whole_logits(whole_model(checkpoint("gpt2"), torch.float32), chunk)
    assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV)
    assert lazy_model.disk_names["transformer.wte.weight"] == "wte.weight"
    assert lazy_model.names.unused == ("h.0.attn.bias",)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_in_many_files_is_the_same(checkpoint, tmp_path, family):
    """A checkpoint in many files has the same survey except for its fingerprint."""
    write_model(FAMILIES[family], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    cut, whole = LazyModel.open(tmp_path), LazyModel.open(checkpoint(family))
    assert cut.survey().linears == whole.survey().linears
    assert cut.survey().fingerprint != whole.survey().fingerprint
    chunk = padded_chunk("left")
    expected_BTV = sharded_logits(whole, chunk, HALVES)
    assert torch.equal(sharded_logits(cut, chunk, HALVES), expected_BTV)


def test_a_70b_model_is_surveyed_from_its_headers(tmp_path):
    """80 blocks and 141 GB in a sparse file: 560 linears, and no weight is read."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, size = {}, 0
    for name, tensor in tensors.items():
        end = size + 2 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    survey = LazyModel.open(tmp_path).survey()
    assert len(survey.linears) == 560
    assert survey.total_parameters == 70_553_706_496
    assert {x.role: LOW_RANK.break_even(x) for x in survey.of_block(79)} == {
        "self_attn.q_proj": 4096,
        "self_attn.k_proj": 910,
        "self_attn.v_proj": 910,
        "self_attn.o_proj": 4096,
        "mlp.gate_proj": 6371,
        "mlp.up_proj": 6371,
        "mlp.down_proj": 6371,
    }
