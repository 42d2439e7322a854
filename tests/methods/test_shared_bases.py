"""Bases shared by several blocks, and refitted left factors, in whole runs."""

import pytest
import torch
from pipeline import contents, run, with_tokenizer, write_llama, write_text

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


def test_blocks_share_their_bases(llama, text, tmp_path):
    """q of blocks 0 and 1 have one `down` in memory and on disk; o has its own; the count is
    right."""
    result = shared(llama, tmp_path / "out", text)
    model = orchestrator.load(result.out)
    layers = model.model.layers
    assert layers[0].self_attn.q_proj.down.weight is layers[1].self_attn.q_proj.down.weight
    assert layers[0].self_attn.o_proj.down.weight is not layers[1].self_attn.o_proj.down.weight
    assert layers[2].mlp.up_proj.down.weight is layers[3].mlp.up_proj.down.weight
    assert layers[4].mlp.up_proj.down.weight is not layers[3].mlp.up_proj.down.weight
    values = result.report["values"]
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


def test_the_cut_changes_no_bit_of_a_group(llama, text, tmp_path):
    """One shard, and shards that end only between groups, write the same bytes."""
    whole = contents(shared(llama, tmp_path / "whole", text, shards=1).out)
    cut = contents(shared(llama, tmp_path / "cut", text, shards=5).out)
    assert cut == whole


def test_a_fit_is_the_least_squares_solution_on_the_compressed_inputs(llama, text, tmp_path):
    """For every linear it equals `lstsq` on the compressed model's inputs, run by transformers."""
    cut = shared(llama, tmp_path / "cut", text)
    fitted = orchestrator.load(shared(llama, tmp_path / "fitted", text, refit="always").out)
    model, dense = orchestrator.load(cut.out), orchestrator.load(llama)
    inputs: dict[str, list[torch.Tensor]] = {}
    cut_linears = [n for n, e in cut.report["linears"].items() if e["form"] == "low_rank"]
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
        found_OR = fitted.get_submodule(name).weight.detach().double()
        given_RO = model.get_submodule(name).weight.detach().T.double()
        losses = [
            float((basis_TR @ left_RO - outputs_TO).square().sum())
            for left_RO in (best_RO, found_OR.T, given_RO)
        ]
        assert losses[0] <= losses[1] * (1 + 1e-9)
        assert losses[1] <= losses[0] * (1 + 1e-4)
        assert losses[1] <= losses[2]
        gained.append(1 - losses[1] / losses[2])
        torch.testing.assert_close(fitted.get_submodule(name).down.weight.double(), down_RI)
    # the tolerance above would not hide a fit without effect
    assert max(gained) > 0.01


def test_the_cut_and_a_second_size_change_no_bit_of_a_fit(llama, text, tmp_path):
    """A refitted size from a run directory with other sizes equals that of a direct run."""
    direct = shared(llama, tmp_path / "direct", text, refit="always", shards=1)
    run_dir = str(tmp_path / "run")
    shared(llama, tmp_path / "other", text, refit="always", keep=0.7, run_dir=run_dir)
    later = shared(llama, tmp_path / "later", text, refit="always", shards=5, run_dir=run_dir)
    assert contents(later.out) == contents(direct.out)


@pytest.mark.ray
def test_two_workers_fit_the_same_bits(llama, text, tmp_path, ray_address):
    """Refitted on two Ray actors, the output equals that of one process."""
    local = contents(shared(llama, tmp_path / "local", text, refit="always").out)
    workers = {"executor": "ray", "address": ray_address, "workers": 2}
    assert contents(shared(llama, tmp_path / "ray", text, refit="always", **workers).out) == local
