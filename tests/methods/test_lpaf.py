"""LPAF end to end: pruning by gradients, then factors, in runs of tiny models."""

import shutil

import pytest
import torch
from pipeline import contents, run, token_chunks, write_llama, write_text
from pools import several
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.methods import make_method

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2)


@pytest.fixture(scope="module")
def result(llama, text, tmp_path_factory):
    """The result at keep 0.5 in one shard; not to be changed."""
    out = tmp_path_factory.mktemp("lpaf") / "out"
    return run(llama, out, text, method="lpaf", shards=1)


def test_a_linear_is_the_factors_of_its_pruned_weight(result, llama, text):
    """Scores |W ∘ G| from the gradient of the summed loss of the text, by autograd: mask, weights
    of rows and truncation in float64 give the weight of the loaded model; the report has its
    errors, rank and energies."""
    dense = AutoModelForCausalLM.from_pretrained(llama)
    inputs = []
    module = dense.get_submodule(DOWN)
    module.register_forward_hook(lambda _, given, output: inputs.append(given[0][0].detach()))
    for chunk in token_chunks(llama, text):
        logits = dense(chunk.tokens).logits[0, :-1]
        labels = chunk.tokens[0, 1:]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    weight_OI = module.weight.detach().double()
    score_OI = (weight_OI * module.weight.grad.double()).abs()
    mask_OI = score_OI >= score_OI.flatten().sort(descending=True).values[score_OI.numel() // 2 - 1]
    pruned_OI, d_O1 = weight_OI * mask_OI, (score_OI * mask_OI).sum(dim=1, keepdim=True).sqrt()
    u_OK, s_K, v_KI = torch.linalg.svd(d_O1 * pruned_OI, full_matrices=False)
    rank = result.plan.assignments[DOWN].rank
    expected_OI = (u_OK[:, :rank] * s_K[:rank]) @ v_KI[:rank] / d_O1
    found_OI = orchestrator.load(result.out).get_submodule(DOWN).dense_weight().detach().double()
    assert float((found_OI - expected_OI).norm() / expected_OI.norm()) < 1e-4
    entry, gap_OI = result.report["linears"][DOWN], weight_OI - found_OI
    rows_TI = torch.cat(inputs).double()
    lost = (rows_TI @ gap_OI.T).square().sum() / (rows_TI @ weight_OI.T).square().sum()
    assert entry["activation_error"] == pytest.approx(float(lost), rel=1e-3)
    wrong = gap_OI.square().sum() / weight_OI.square().sum()
    assert entry["weight_error"] == pytest.approx(float(wrong), rel=1e-3)
    for name, each in (("pruned", pruned_OI), ("dense", weight_OI)):
        energies_K = torch.linalg.svdvals(each).square()
        held = float(energies_K[:rank].sum() / energies_K.sum())
        assert entry[f"{name}_energy"] == pytest.approx(held, rel=1e-4)
    assert entry["numerics"]["pruned_rank"] == int(torch.linalg.matrix_rank(pruned_OI.float()))


def test_neither_shards_nor_workers_change_a_byte(result, llama, text, tmp_path, monkeypatch):
    """One shard in this process, and two shards on three workers."""
    several(monkeypatch, size=3)
    run(llama, tmp_path / "out", text, method="lpaf", shards=2)
    assert contents(tmp_path / "out") == contents(result.out)


def test_another_size_needs_no_pass(result, llama, text, tmp_path):
    """A cut of the same decompositions is sound against the dense model."""
    run_dir, events = shutil.copytree(result.run_dir, tmp_path / "run"), []
    fields = {"method": "lpaf", "keep": 0.7, "on_event": events.append}
    run(llama, tmp_path / "cut", text, run_dir=str(run_dir), **fields)
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)
    assert orchestrator.verify(tmp_path / "cut", against=llama)["problems"] == []


def test_options_are_checked():
    """Movement scores are refused with the reason; options change the unit."""
    with pytest.raises(UsageError, match="movement scores need a training of the dense model"):
        make_method("lpaf", {"scores": "movement"})
    with pytest.raises(UsageError, match="density is 0"):
        make_method("lpaf", {"density": 0.0})
    options = [{}, {"density": 1}, {"weights": "none"}, {"norm": "inputs"}]
    assert len({make_method("lpaf", each).decomposition for each in options}) == 4
