"""Checkpoints of all forms in stock transformers: dtypes, device maps, offloading, damage."""

import json

import pytest
import torch
from compressed import (
    TOKENS,
    changed,
    compress,
    logits,
    mixed_plan,
)
from families import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import orchestrator.hf
from orchestrator.errors import InputError
from orchestrator.hf.export import export_dense
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.models.forms.sparse import SparseLinear
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel


def test_values_can_be_trained_and_indices_cannot(llama):
    """All parameters of all forms have gradients; indices stay integers in any dtype."""
    model = AutoModelForCausalLM.from_pretrained(llama.directory)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    before = {name: index.clone() for name, index in model.named_buffers() if "inv" not in name}
    model.bfloat16()
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], index) for name, index in before.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_dtype_changes_only_values(dtype, tmp_path):
    """Values are rounded once; indices are stored as integers, unchanged."""
    dense = write_checkpoint("gpt2", tmp_path / "dense")
    wide = compress(dense, tmp_path / "wide", make_plan=mixed_plan)
    narrow = compress(dense, tmp_path / "narrow", make_plan=mixed_plan, output_dtype=dtype)
    before = load_file(wide.directory / "model.safetensors")
    after = load_file(narrow.directory / "model.safetensors")
    assert list(before) != []
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(dtype) if tensor.is_floating_point() else tensor)
    assert AutoModelForCausalLM.from_pretrained(narrow.directory).dtype == dtype
    export_dense(narrow.directory, tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == dtype


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_no_logit(llama, expected, device_map):
    """All forms are dispatched, and give the same logits."""
    model = AutoModelForCausalLM.from_pretrained(llama.directory, device_map=device_map)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("on_disk", [(0, 1), (2, 3), (0, 1, 2, 3)])
def test_blocks_can_be_offloaded_to_disk(llama, expected, tmp_path, on_disk, offload_buffers):
    """Values, indices and bases are offloaded like any weight, and fetched on demand."""
    places = {f"model.layers.{i}": "disk" if i in on_disk else "cpu" for i in range(4)}
    names = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")
    places |= dict.fromkeys(names, "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        llama.directory,
        device_map=places,
        offload_folder=tmp_path,
        offload_buffers=offload_buffers,
    )
    assert model.model.layers[on_disk[0]].self_attn.k_proj.weight.is_meta
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kilobytes", [30, 70])
def test_offloaded_weights_are_saved(llama, expected, tmp_path, kilobytes):
    """An automatic map keeps a group together; saving reads back what is on disk."""
    model = AutoModelForCausalLM.from_pretrained(
        llama.directory,
        device_map="auto",
        max_memory={"cpu": kilobytes * 1000},
        offload_folder=tmp_path / "offload",
    )
    first, second = (model.model.layers[block].self_attn.q_proj for block in (2, 3))
    assert first.down.weight.is_meta
    assert first.down.weight is second.down.weight
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("cut", [(4,), (1, 3), (1, 1, 2), (1, 1, 1, 1)])
def test_shards_may_be_cut_within_a_group(llama, expected, cut):
    """A shard without the basis' owner reads the owner's tensor; logits equal the whole model's."""
    lazy_model = LazyModel.open(llama.directory)
    chunk, start = Chunk(0, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool)), 0
    for size in cut:
        with lazy_model.shard(range(start, start + size)) as shard:
            start += size
            if shard.is_last:
                assert torch.equal(shard.logits(chunk), expected)
            else:
                chunk = shard.forward(chunk)


def test_the_body_loads_without_the_head(llama):
    """AutoModel finds modules and bases although their names lack the prefix."""
    whole = AutoModelForCausalLM.from_pretrained(llama.directory).model
    body = AutoModel.from_pretrained(llama.directory)
    assert (
        body.layers[0].self_attn.q_proj.down.weight is body.layers[1].self_attn.q_proj.down.weight
    )
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, whole(TOKENS).last_hidden_state)


def test_it_compiles_in_one_graph(made):
    """No form breaks a compiled graph: no shape in them depends on data."""
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (SparseLinear, "index"),
        (SparseLinear, "rows"),
        (SparseLinear, "weight"),
        (PivotedLinear, "index"),
        (PivotedLinear, "weight"),
    ],
)
def test_missing_tensors_stop_the_load(made, tmp_path, kind, part):
    """A missing index stops every loader; missing values stop the package's own."""
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    name = next(
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, kind) and hasattr(module, part)
    )
    path = next(p for p in tmp_path.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    del tensors[name]
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    del index["weight_map"][name]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"not stored|the checkpoint is damaged"):
        orchestrator.hf.load(tmp_path)
    with pytest.raises(InputError, match=f"1 of .* are not stored: {name}"):
        LazyModel.open(tmp_path)
    if part != "weight":
        with pytest.raises(InputError, match="the checkpoint is damaged"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_cannot_contradict_the_tensors(made, tmp_path):
    """A code or number of nonzeros other than the stored one is an error."""

    def other_code(modules):
        entry = next(entry for entry in modules.values() if entry.get("index") == "bitmask")
        entry["index"] = "positions"

    directory = changed(made, tmp_path, other_code)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(InputError, match="has shape"):
        export_dense(directory, tmp_path / "export")
