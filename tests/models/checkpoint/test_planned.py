"""Lazy model of a checkpoint that has not been written."""

import pytest
import torch
from compressed import compress, mixed_plan
from families import FAMILIES
from sharded import HALVES, padded_chunk, sharded_logits

from orchestrator.errors import InputError
from orchestrator.models.forms.index_codes import encode
from orchestrator.models.shards.lazy_model import LazyModel


def planned(made, *, output_dtype=None, dtype=None):
    """Planned checkpoint that `compress` with `mixed_plan` would write; also the parts read."""
    dense, asked, parts = LazyModel.open(made.dense), [], made.parts
    survey = dense.survey()
    plan = mixed_plan(survey)
    linears = {linear.name: linear for linear in survey.linears}

    def read(spec):
        asked.append(spec.name)
        if spec.part == "copy":
            return dense.weights.read(spec.source)
        if spec.part in parts[spec.source]:
            return parts[spec.source][spec.part]
        linear = linears[spec.source]
        positions_N = parts[spec.source]["positions"]
        return encode(spec.code, positions_N, linear.out_features, linear.in_features)[spec.part]

    return dense.planned(plan, read, output_dtype=output_dtype, dtype=dtype), asked


@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_as_the_written_checkpoint(made_of, tmp_path, family, output_dtype):
    """Every form in every family, bit for bit, also if writing rounds to 16 bits."""
    made = made_of(family)
    lazy_model, _ = planned(made, output_dtype=output_dtype, dtype=torch.float32)
    if output_dtype is not None:
        fields = {"output_dtype": output_dtype, "parts": made.parts}
        made = compress(made.dense, tmp_path / "out", make_plan=mixed_plan, **fields)
    written = LazyModel.open(made.directory, dtype=torch.float32)
    assert lazy_model.tensors() == written.tensors()
    assert lazy_model.names.tied == written.names.tied
    chunk = padded_chunk("left")
    expected_BTV = sharded_logits(written, chunk, HALVES)
    assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV)


def test_a_shard_reads_only_its_own_parts(llama):
    """Opening reads no tensor; a shard reads those of its blocks, and a shared basis."""
    lazy_model, asked = planned(llama)
    assert asked == []
    with lazy_model.shard(range(1, 2)) as shard:
        inside = [name for name in asked if name.startswith("model.layers.1.")]
        (basis,) = set(asked) - set(inside)
        assert basis == "model.layers.0.self_attn.q_proj.down.weight"
        assert set(inside) == set(lazy_model.block_names(1)) & set(lazy_model.disk_names)
        assert "model.layers.1.self_attn.q_proj.down.weight" in shard.parameters()


def test_planning_needs_a_dense_checkpoint(llama):
    """A compressed checkpoint is not compressed again."""
    lazy_model, _ = planned(llama)
    with pytest.raises(InputError, match="already compressed"):
        lazy_model.planned(None, None)
