"""Bases shared by the experts of a block, in whole runs."""

import json
import re
import shutil

import pytest
import torch
from moe.families import EXPERTS
from pipeline import add_tokenizer, contents, run, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.cli.main import main
from orchestrator.errors import UsageError

TOKENS = torch.arange(3, 23)[None] * 3 % 96
BLOCK = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def qwen(moe_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return add_tokenizer(shutil.copytree(moe_checkpoint("qwen3_moe"), root / "dense"))


def shared(model, out, text, **fields):
    return run(model, out, text, method="expert-sharing", **fields)


@pytest.fixture(scope="module")
def whole(qwen, text, tmp_path_factory):
    """In one shard; not to be changed."""
    return shared(qwen, tmp_path_factory.mktemp("whole") / "out", text, shards=1)


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_experts_have_one_basis_in_memory_and_on_disk(whole):
    """Gates and ups one of inputs, downs one of outputs; the plan counts each once."""
    experts = orchestrator.load(whole.out).get_submodule(BLOCK)
    gates_and_ups = [
        experts.get_submodule(f"{e}.{part}").down.weight
        for e in range(EXPERTS)
        for part in ("gate", "up")
    ]
    downs = [experts.get_submodule(f"{e}.down").weight for e in range(EXPERTS)]
    for one in (gates_and_ups, downs):
        assert all(each is one[0] for each in one)
    stored = load_file(whole.out / "model.safetensors")
    sizes = {name: each.numel() for name, each in stored.items() if name.startswith(BLOCK)}
    counted = {
        name: entry["values"]
        for name, entry in whole.report["linears"].items()
        if name.startswith(BLOCK)
    }
    guard = sizes.pop(f"{BLOCK}.gate_up_proj")
    assert guard == 3 * EXPERTS
    assert sum(sizes.values()) == sum(counted.values())
    hidden, inner = 32, 24
    up, down = (whole.plan.assignments[f"{BLOCK}.3.{part}"].rank for part in ("up", "down"))
    assert sum(counted.values()) == up * (hidden + 2 * EXPERTS * inner) + down * (
        hidden + EXPERTS * inner
    )
    assert whole.plan.assignments[f"{BLOCK}.3.up"].basis == f"{BLOCK}.0.gate"
    assert whole.plan.assignments[f"{BLOCK}.3.down"].basis == f"{BLOCK}.0.down"


def test_transformers_loads_and_saves_it(whole, tmp_path):
    """No key is missing or unexpected, `generate` runs, and a saved copy has the same names."""
    model, info = AutoModelForCausalLM.from_pretrained(whole.out, output_loading_info=True)
    assert not any(info.values()), info
    expected = logits_of(model)
    generated = model.generate(TOKENS, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert generated[0, TOKENS.shape[1]] == expected[0, -1].argmax()
    model.save_pretrained(tmp_path)
    names = [load_file(place / "model.safetensors").keys() for place in (whole.out, tmp_path)]
    assert names[0] == names[1]
    again = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)


def test_a_second_shard_changes_no_byte(whole, qwen, text, tmp_path):
    """Groups are within a block, so that any cut of the model gives the same files."""
    assert contents(shared(qwen, tmp_path / "two", text, shards=2).out) == contents(whole.out)


def test_it_is_verified_and_exported(whole, qwen, tmp_path, capsys):
    """The dense model of the export has the logits of the compressed one, and its own names."""
    assert main(["verify", str(whole.out), "--against", str(qwen)]) == 0
    export = tmp_path / "export"
    assert main(["export", str(whole.out), str(export), "--format", "dense"]) == 0
    found, dense = (load_file(each / "model.safetensors") for each in (export, qwen))
    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in dense.items()
    }
    expected = logits_of(AutoModelForCausalLM.from_pretrained(whole.out))
    found = logits_of(AutoModelForCausalLM.from_pretrained(export))
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_another_size_of_the_run_is_that_of_a_run_of_its_own(whole, qwen, text, tmp_path):
    """From the same decompositions, byte for byte, with left factors that are fitted again; they
    lower the error of gates and ups, and leave the basis of downs."""
    run_dir = str(shutil.copytree(whole.run_dir, tmp_path / "run"))
    options = {"expert-sharing": {"refit": "always"}}
    again = shared(qwen, tmp_path / "again", text, options=options, run_dir=run_dir, keep=0.6)
    plain = shared(qwen, tmp_path / "plain", text, run_dir=run_dir, keep=0.6)
    fitted, cut = (load_file(each.out / "model.safetensors") for each in (again, plain))
    changed = {name for name in cut if not torch.equal(fitted[name], cut[name])}
    assert f"{BLOCK}.2.gate.weight" in changed
    assert not [name for name in changed if name.endswith("down.weight")]
    assert f"{BLOCK}.0.down.weight" not in changed
    direct = shared(qwen, tmp_path / "direct", text, options=options, keep=0.6)
    assert contents(direct.out) == contents(again.out)


def test_the_report_page_names_the_basis(whole, tmp_path):
    """By the expert that stores it and by its linear there."""
    page = tmp_path / "page.html"
    assert main(["report", str(whole.out), "--output", str(page)]) == 0
    assert re.search(r">0\.gate<", page.read_text())
    assert re.search(r">0\.down<", page.read_text())
    forms = json.loads((whole.out / "config.json").read_bytes())["quantization_config"]
    assert forms["experts"][BLOCK]["down"]["form"] == "output_basis"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": ("*.q_proj",)}, "no targeted linear is an expert's"),
        ({"storage": "pivoted"}, "shares bases among experts; pivots are"),
        ({"compensate": "anchored"}, "shares bases among experts, which cannot follow"),
    ],
)
def test_what_a_shared_basis_excludes_is_refused(qwen, text, tmp_path, fields, message):
    """Each before a weight is read, with what to give in its place."""
    with pytest.raises(UsageError, match=message):
        shared(qwen, tmp_path / "out", text, **fields)
