"""Checkpoints of mixtures of experts from the command line: verified, exported, reported."""

import json
import shutil

import pytest
import torch
from pipeline import add_tokenizer, write_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.cli.main import main

FAMILIES = ["mixtral", "qwen3_moe"]
TOKENS = torch.arange(3, 23)[None] * 3 % 96


@pytest.fixture(scope="module")
def compressed_moe(moe_checkpoint, tmp_path_factory):
    """Directory of a family's dense model and, in `out`, of its compressed one, in two shards."""
    root = tmp_path_factory.mktemp("moe")
    text = write_text(root / "text.txt")
    made = {}

    def make(family):
        if family not in made:
            directory = root / family
            add_tokenizer(shutil.copytree(moe_checkpoint(family), directory / "dense"))
            command = ["compress", str(directory / "dense"), str(directory / "out")]
            command += ["--calibration", str(text), "--executor", "local", "--shards", "2"]
            command += ["--samples", "6", "--sequence-length", "48", "--keep", "0.6"]
            assert main([*command, "--method", "two-sided"]) == 0
            made[family] = directory
        return made[family]

    return make


def logits_of(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_gives_a_verified_checkpoint(compressed_moe, family, capsys):
    """Every file, form, index and guard is as reported, with ranks of their own for experts."""
    directory = compressed_moe(family)
    assert main(["verify", str(directory / "out"), "--against", str(directory / "dense")]) == 0
    forms = json.loads((directory / "out/config.json").read_bytes())["quantization_config"]
    assert forms["format_version"] == 2
    columns = [each for parts in forms["experts"].values() for each in parts.values()]
    ranks = [rank for column in columns for rank in column["rank"]]
    assert len(ranks) == 4 * 4 * 3
    assert len(set(ranks)) > 1
    # which has no experts in low rank
    assert "vllm serve" not in (directory / "out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_a_dense_model(compressed_moe, family, tmp_path, capsys):
    """Names and shapes are those of the dense checkpoint, logits those of the compressed one."""
    directory = compressed_moe(family)
    export = tmp_path / "export"
    assert main(["export", str(directory / "out"), str(export), "--format", "dense"]) == 0
    found, dense = (load_file(each / "model.safetensors") for each in (export, directory / "dense"))
    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in dense.items()
    }
    expected = logits_of(directory / "out")
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits_of(export), expected, rtol=0, atol=tolerance)


def test_verify_finds_a_guard_of_other_ranks(compressed_moe, tmp_path, capsys):
    """The message names the experts, beside the file that was changed."""
    copy = tmp_path / "out"
    shutil.copytree(compressed_moe("qwen3_moe") / "out", copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 3] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(copy)]) == 4
    output = capsys.readouterr()
    assert "model.layers.1.mlp.experts: the ranks that are stored" in output.out + output.err


def test_another_size_is_written_from_the_run(compressed_moe, tmp_path, capsys):
    """`retarget` gives experts other ranks, and their guard follows."""
    directory = compressed_moe("qwen3_moe")
    run = shutil.copytree(directory / "out.run", tmp_path / "run")
    command = ["retarget", str(run), str(tmp_path / "larger"), "--keep", "0.8"]
    assert main([*command, "--executor", "local"]) == 0
    assert main(["verify", str(tmp_path / "larger")]) == 0
    guard = "model.layers.0.mlp.experts.gate_up_proj"
    places = directory / "out", tmp_path / "larger"
    small, large = (load_file(place / "model.safetensors")[guard] for place in places)
    assert not torch.equal(small, large)


def test_the_report_has_a_map_of_experts(compressed_moe, tmp_path):
    """A cell for each expert with its kept fraction and its tokens, which sum to those routed."""
    directory = compressed_moe("qwen3_moe")
    output = tmp_path / "page.html"
    assert main(["report", str(directory / "out"), "--output", str(output)]) == 0
    page = output.read_text()
    report = json.loads((directory / "out/orchestrator_report.json").read_bytes())
    tokens = report["experts"]["tokens"]
    assert len(tokens) == 4 * 4
    # every token of a block goes to two experts
    assert sum(tokens.values()) == 4 * 2 * report["calibration"]["tokens_used"]
    for name, count in tokens.items():
        parts = [report["linears"][f"{name}.{part}"] for part in ("gate", "up", "down")]
        kept = sum(part["values"] for part in parts) / (3 * 24 * 32)
        assert f"{name}: kept {kept:.4f} of 3 linears, {count:,} tokens" in page
    section = page.partition(">Experts</h2>")[2]
    assert section.partition("<h2")[0].count("tokens</title>") == 4 * 4
    assert "experts.0 tokens" not in page
