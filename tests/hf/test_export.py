"""Compressed checkpoints multiplied back to dense ones."""

import json

import pytest
import torch
from compressed import compress, logits
from families import FAMILIES, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # the compressed checkpoints are loaded to compare
from orchestrator.errors import InputError, UsageError
from orchestrator.hf.export import export_dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_export_has_the_logits_of_the_compressed_model(family, halved, tmp_path):
    """Only the order of multiplication differs: 1e-5 of the largest logit in fp32."""
    made = halved(family)
    export_dense(made.directory, tmp_path / "export")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export"))
    expected = logits(AutoModelForCausalLM.from_pretrained(made.directory))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_products_are_taken_in_fp32_and_rounded_once(tmp_path):
    """bf16 factors give the bf16 rounding of their fp32 product; other tensors stay bit for bit."""
    dense = write_checkpoint("llama", tmp_path / "dense", dtype=torch.bfloat16)
    made = compress(dense, tmp_path / "out")
    export_dense(made.directory, tmp_path / "export")
    before = load_file(made.directory / "model.safetensors")
    after = load_file(tmp_path / "export" / "model.safetensors")
    native = load_file(dense / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in native.items()
    }
    for name, tensor in after.items():
        linear = name.removesuffix(".weight")
        if linear in made.factors:
            weight, down = before[name].float(), before[f"{linear}.down.weight"].float()
            assert torch.equal(tensor, (weight @ down).bfloat16()), name
        else:
            assert torch.equal(tensor, native[name]), name


def test_a_saved_again_checkpoint_exports_too(tmp_path):
    """The factors of one linear may lie in different files after save_pretrained."""
    made = compress(write_checkpoint("llama", tmp_path / "dense"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    export_dense(made.directory, tmp_path / "one")
    export_dense(tmp_path / "again", tmp_path / "two")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(one), logits(two))


def test_what_cannot_be_exported_is_refused(tmp_path):
    """A dense model, a rank that is not the stored one, and a target in use are told apart."""
    dense = write_checkpoint("llama", tmp_path / "dense")
    made = compress(dense, tmp_path / "out")
    with pytest.raises(InputError, match="not compressed by orchestrator"):
        export_dense(dense, tmp_path / "export")
    with pytest.raises(UsageError, match="contains other files"):
        export_dense(made.directory, dense)
    with pytest.raises(UsageError, match="finished checkpoint"):
        export_dense(made.directory, made.directory)
    path = made.directory / "config.json"
    config = json.loads(path.read_bytes())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["rank"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="has shape"):
        export_dense(made.directory, tmp_path / "export")
    assert not (tmp_path / "export").exists()
