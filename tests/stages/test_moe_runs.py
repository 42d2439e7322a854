"""Runs on mixtures of experts, from calibration to checkpoints that stock transformers loads."""

import shutil

import pytest
import torch
from moe.families import MOE_FAMILIES
from pipeline import add_tokenizer, run, token_chunks, write_text
from sharded import HALVES, sharded_logits
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # compressed checkpoints are loaded by transformers
from orchestrator.models.shards.lazy_model import LazyModel

pytestmark = pytest.mark.usefixtures("split_experts")


@pytest.fixture(scope="module")
def moe_text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="module")
def moe_model(moe_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def make(family):
        directory = root / family
        if not directory.exists():
            shutil.copytree(moe_checkpoint(family), directory)
            add_tokenizer(directory)
        return directory

    return make


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_is_compressed_and_loads(family, moe_model, moe_text, tmp_path):
    """On two shards, with own ranks of every expert's linears; transformers loads the result.

    Its logits are those of the shards, it generates, and saves what it has loaded.
    """
    model = moe_model(family)
    result = run(model, tmp_path / "out", moe_text, method="two-sided", shards=2)
    experts = [n for n, a in result.plan.assignments.items() if ".experts." in n and a.rank]
    assert len({result.plan.assignments[name].rank for name in experts}) > 1
    assert result.report["kept"]["linears"] <= 0.5
    assert sum(result.report["experts"]["tokens"].values()) > 0
    chunk = token_chunks(model, moe_text)[0]
    loaded, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected_BTV = loaded(input_ids=chunk.tokens).logits
    found_BTV = sharded_logits(LazyModel.open(result.out), chunk, HALVES)
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=2e-6)
    settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    assert loaded.generate(chunk.tokens[:, :8], **settings).shape == (1, 10)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(input_ids=chunk.tokens).logits, expected_BTV)
