"""Bolaco end to end: principal components of outputs with a bias, in runs of tiny models."""

import shutil

import pytest
import torch
from pipeline import contents, run, token_chunks, with_tokenizer, write_llama, write_text
from pools import several
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.models.evaluation.verification import compare_kept
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.input_means import MeansCalibration


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2)


@pytest.fixture(scope="module")
def result(llama, text, tmp_path_factory):
    """The result at keep 0.5 in one shard; not to be changed."""
    out = tmp_path_factory.mktemp("bolaco") / "out"
    return run(llama, out, text, method="bolaco", shards=1)


def outputs_of(dense, directory, text, names):
    """Inputs and outputs of linears for the calibration tokens, float64, by name."""
    seen = {name: [] for name in names}
    for name in names:
        dense.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append((inputs[0][0], output[0]))
        )
    with torch.no_grad():
        for chunk in token_chunks(directory, text):
            dense(input_ids=chunk.tokens)
    return {
        name: tuple(torch.cat(each).double() for each in zip(*pairs, strict=True))
        for name, pairs in seen.items()
    }


def test_the_logits_are_those_of_components_and_bias(result, llama, text):
    """In the dense model, weights Q Qᵀ W and biases (1 − Q Qᵀ) μ from outputs that were seen, by
    an eigendecomposition of their covariance, give the logits of the loaded checkpoint; the
    errors in the report are those on these outputs."""
    dense = AutoModelForCausalLM.from_pretrained(llama)
    ranks = {name: each.rank for name, each in result.plan.assignments.items()}
    assert all(ranks.values())
    for name, (_, outputs_TO) in outputs_of(dense, llama, text, ranks).items():
        rank, module = ranks[name], dense.get_submodule(name)
        _, vectors_OO = torch.linalg.eigh(torch.cov(outputs_TO.T, correction=0))
        q_OR, mean_O = vectors_OO[:, -rank:], outputs_TO.mean(dim=0)
        weight_OI = module.weight.detach().double()
        module.weight = nn.Parameter((q_OR @ (q_OR.T @ weight_OI)).float())
        module.bias = nn.Parameter((mean_O - q_OR @ (q_OR.T @ mean_O)).float())
        about_TO = outputs_TO - mean_O
        lost = (about_TO - about_TO @ q_OR @ q_OR.T).square().sum()
        entry = result.report["linears"][name]
        expected = float(lost / outputs_TO.square().sum())
        assert entry["activation_error"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert entry["form"] == "affine"
    tokens = token_chunks(llama, text)[0].tokens
    with torch.no_grad():
        expected, found = (m(tokens).logits for m in (dense, orchestrator.load(result.out)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_the_budget_counts_the_biases(result):
    """Stored values are factors and a bias each, within the budget; the loaded model has them."""
    values, loaded = result.report["values"], orchestrator.load(result.out)
    assert values["stored"] <= values["budget"]
    assert values["model_after"] == sum(each.numel() for each in loaded.parameters())
    sizes = {name: m for name, m in loaded.named_modules() if name in result.plan.assignments}
    for name, assignment in result.plan.assignments.items():
        module, entry = sizes[name], result.report["linears"][name]
        outputs, inputs = module.out_features, module.in_features
        assert entry["values"] == assignment.rank * (outputs + inputs) + outputs
        # a uniform share holds no further rank
        assert entry["values"] + outputs + inputs > outputs * inputs // 2


def test_neither_shards_nor_workers_change_a_byte(result, llama, text, tmp_path, monkeypatch):
    """One shard in this process, and two shards on three workers."""
    several(monkeypatch, size=3)
    run(llama, tmp_path / "out", text, method="bolaco", shards=2)
    assert contents(tmp_path / "out") == contents(result.out)


def test_another_size_is_that_of_a_run_of_its_own(result, llama, text, tmp_path):
    """Biases of another rank come from the stored means: no pass, and the bytes of a direct run."""
    run_dir, events = shutil.copytree(result.run_dir, tmp_path / "run"), []
    fields = {"method": "bolaco", "keep": 0.7}
    cut = {"run_dir": str(run_dir), "on_event": events.append}
    run(llama, tmp_path / "cut", text, **fields, **cut)
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)
    run(llama, tmp_path / "direct", text, **fields)
    assert contents(tmp_path / "cut") == contents(tmp_path / "direct")


def test_pooled_is_total_within_one_group(result, llama, text, tmp_path):
    """Six sequences are one group of 32: both covariances give the same tensors."""
    options = {"bolaco": {"covariance": "pooled"}}
    pooled = run(llama, tmp_path / "out", text, method="bolaco", options=options)
    one, other = (load_file(each.out / "model.safetensors") for each in (result, pooled))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_groups_are_of_32_sequences(llama, text):
    """A statistic has a sum for sequences 0 to 31 and one for those after them; padding is out."""
    chunks = token_chunks(llama, text, layout="packed")[:2]
    with LazyModel.open(llama).shard(range(1)) as shard:
        linears = [each for each in shard.linears if each.role.endswith("q_proj")]
        calibration = MeansCalibration(shard, linears, lambda linear, site: "output")
        for index in (0, 31, 32):
            mask = chunks[0].mask.clone()
            mask[0, 40:] = index == 0
            calibration.forward(type(chunks[0])(index, chunks[0].tokens, mask))
        calibration.flush_writes()
        found = calibration.statistic(linears[0]).means
        assert found.tokens_G.tolist() == [88.0, 40.0]
        assert found.bias_O is None
        calibration.close()


def test_families_with_biases_keep_their_mean_outputs(checkpoint, text, tmp_path):
    """Biases of q, k and v of a Qwen2 are replaced: the mean output of every cut linear on its
    dense inputs is the dense one's; its copy in other files is taken for the model that was
    compressed."""
    directory = with_tokenizer(checkpoint("qwen2"), tmp_path / "dense")
    made = run(directory, tmp_path / "out", text, method="bolaco", keep=0.6)
    dense, cut = AutoModelForCausalLM.from_pretrained(directory), orchestrator.load(made.out)
    names = [name for name, each in made.plan.assignments.items() if each.form == "affine"]
    assert any(dense.get_submodule(name).bias is not None for name in names)
    for name, (inputs_TI, outputs_TO) in outputs_of(dense, directory, text, names).items():
        mean_O = cut.get_submodule(name)(inputs_TI.float()).detach().double().mean(dim=0)
        scale = float(outputs_TO.abs().max())
        torch.testing.assert_close(mean_O, outputs_TO.mean(dim=0), rtol=0, atol=1e-5 * scale)
    kept, other = compare_kept(LazyModel.open(directory), LazyModel.open(made.out))
    assert (kept > 0, other) == (True, None)
    assert orchestrator.verify(made.out, against=directory)["problems"] == []


def test_a_trial_of_a_cut_has_its_bias(result, llama, text, tmp_path):
    """`strs` measures the loss of the model with one linear cut, weight and bias: the loss that it
    tells is that of the dense model with both replaced, and linears are whole again for the next
    trial."""
    options = {"strs": {"grid": "0.5", "windows": 2}}
    run_dir = shutil.copytree(result.run_dir, tmp_path / "run")
    fields = {"method": "bolaco", "allocation": "strs", "options": options}
    found = run(llama, tmp_path / "out", text, run_dir=str(run_dir), **fields).report
    losses = found["strs"]["losses"]
    compressed = orchestrator.load(result.out)
    chunks = token_chunks(llama, text)[:2]
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        dense = AutoModelForCausalLM.from_pretrained(llama)
        parent, _, child = name.rpartition(".")
        setattr(dense.get_submodule(parent), child, compressed.get_submodule(name))
        with torch.no_grad():
            given = [dense(each.tokens, labels=each.tokens).loss for each in chunks]
        rank = result.plan.assignments[name].rank
        assert losses[name][str(rank)] == pytest.approx(float(sum(given)) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": "pivoted"}, "bolaco keeps the form affine; give storage 'plain'"),
        ({"compensate": "input"}, "the bias of bolaco would stay that of the factors before"),
        ({"allocation": "d-rank"}, "ranks of form .affine. differ in price"),
        ({"options": {"bolaco": {"covariance": "mean"}}}, "covariance is 'mean'"),
    ],
)
def test_what_a_bias_excludes_is_refused(fields, message, llama, text, tmp_path):
    """In one line, before any pass."""
    with pytest.raises(UsageError, match=message):
        run(llama, tmp_path / "out", text, method="bolaco", **fields)


def test_experts_are_refused(moe_checkpoint, text, tmp_path):
    """Rows of an expert's Gram carry the router's weights, those of its means would not."""
    directory = with_tokenizer(moe_checkpoint("qwen3_moe"), tmp_path / "dense")
    with pytest.raises(UsageError, match=r"is an expert's.*--ignore '\*.experts.\*'"):
        run(directory, tmp_path / "out", text, method="bolaco")
    made = run(directory, tmp_path / "out", text, method="bolaco", ignore=("*.experts.*",))
    assert {each.form for each in made.plan.assignments.values()} == {"affine"}
