"""Bases shared by several blocks, and refitted left factors, in whole runs."""

import shutil

import pytest
import torch
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from pools import several

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer

TOKENS = torch.arange(2, 34)[None] * 5 % 96


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=5)


def shared(model, out, text, *, group=2, refit="never", **fields):
    options = {"basis-sharing": {"group": group, "refit": refit}}
    return run(model, out, text, method="basis-sharing", options=options, **fields)


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    """Groups of two in one shard; not to be changed."""
    return shared(llama, tmp_path_factory.mktemp("whole") / "out", text, shards=1)


@pytest.fixture(scope="module")
def fitted(llama, text, tmp_path_factory):
    """Refitted groups of two in one shard; not to be changed."""
    out = tmp_path_factory.mktemp("fitted") / "out"
    return shared(llama, out, text, refit="always", shards=1)


def test_blocks_share_their_bases(whole):
    """q of blocks 0 and 1 have one `down` in memory and on disk; o has its own; the count is
    right."""
    model = orchestrator.load(whole.out)
    layers = model.model.layers
    assert layers[0].self_attn.q_proj.down.weight is layers[1].self_attn.q_proj.down.weight
    assert layers[0].self_attn.o_proj.down.weight is not layers[1].self_attn.o_proj.down.weight
    assert layers[2].mlp.up_proj.down.weight is layers[3].mlp.up_proj.down.weight
    assert layers[4].mlp.up_proj.down.weight is not layers[3].mlp.up_proj.down.weight
    values = whole.report["values"]
    assert values["stored"] <= values["budget"]
    assert values["model_after"] == sum(each.numel() for each in model.parameters())


def test_a_model_without_such_linears_is_refused(text, checkpoint, tmp_path):
    """GPT-2 has no linear named q_proj: a group of two is an error."""
    model = with_tokenizer(checkpoint("gpt2"), tmp_path / "dense")
    with pytest.raises(UsageError, match="group is 2, but no targeted linear is named"):
        shared(model, tmp_path / "out", text)


def test_one_block_per_group_is_svd_llm(llama, text, tmp_path):
    """With group 1 the weights equal those of SVD-LLM, bit for bit."""
    one = contents(shared(llama, tmp_path / "one", text, group=1).out)
    plain = contents(run(llama, tmp_path / "plain", text).out)
    assert one["model.safetensors"] == plain["model.safetensors"]


def test_cut_and_workers_change_no_bit_of_a_group(whole, llama, text, tmp_path, monkeypatch):
    """One shard, and shards of two workers that end only between groups, write the same bytes."""
    several(monkeypatch, size=2)
    cut = shared(llama, tmp_path / "cut", text, shards=5)
    assert contents(cut.out) == contents(whole.out)


def test_a_fit_is_the_least_squares_solution_on_the_compressed_inputs(whole, fitted, llama, text):
    """For every linear it equals `lstsq` on the compressed model's inputs, run by transformers."""
    refitted = orchestrator.load(fitted.out)
    model, dense = orchestrator.load(whole.out), orchestrator.load(llama)
    inputs: dict[str, list[torch.Tensor]] = {}
    cut_linears = [n for n, e in whole.report["linears"].items() if e["form"] == "low_rank"]
    for name in cut_linears:
        rows = inputs.setdefault(name, [])
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0].flatten(0, 1).double())
        )
    tokens = load_tokens(str(text), tokenizer=load_tokenizer(llama), samples=6, sequence_length=48)
    with torch.no_grad():
        for row in tokens.ids:
            model(input_ids=torch.tensor(row)[None])
    gained = []
    for name in cut_linears:
        rows_TI = torch.cat(inputs[name])
        down_RI = model.get_submodule(name).down.weight.detach().double()
        weight_OI = dense.get_submodule(name).weight.detach().double()
        outputs_TO, basis_TR = rows_TI @ weight_OI.T, rows_TI @ down_RI.T
        best_RO = torch.linalg.lstsq(basis_TR, outputs_TO).solution
        found_OR = refitted.get_submodule(name).weight.detach().double()
        given_RO = model.get_submodule(name).weight.detach().T.double()
        losses = [
            float((basis_TR @ left_RO - outputs_TO).square().sum())
            for left_RO in (best_RO, found_OR.T, given_RO)
        ]
        assert losses[0] <= losses[1] * (1 + 1e-9)
        assert losses[1] <= losses[0] * (1 + 1e-4)
        assert losses[1] <= losses[2]
        gained.append(1 - losses[1] / losses[2])
        torch.testing.assert_close(refitted.get_submodule(name).down.weight.double(), down_RI)
    # the tolerance above would not hide a fit without effect
    assert max(gained) > 0.01


def test_cut_and_workers_and_a_second_size_change_no_bit_of_a_fit(
    whole, fitted, llama, text, tmp_path, monkeypatch
):
    """A refitted size from a run directory with other sizes equals that of a direct run, for any
    number of workers, which share no object."""
    run_dir = str(shutil.copytree(whole.run_dir, tmp_path / "run"))
    shared(llama, tmp_path / "other", text, refit="always", keep=0.7, run_dir=run_dir)
    several(monkeypatch, size=2)
    later = shared(llama, tmp_path / "later", text, refit="always", shards=5, run_dir=run_dir)
    assert contents(later.out) == contents(fitted.out)
