"""Learned scores as a part of a run, and what cannot be learned."""

import json

import pytest
import torch
from pipeline import run, with_tokenizer
from safetensors.torch import load_file, save_file

from orchestrator import load, retarget, verify
from orchestrator.errors import InfeasibleError, InputError, UsageError

FAST = {"rate": 0.25, "penalty": 0.002, "growth": 2.0, "growth_every": 1, "batch": 2}
FAST |= {"steps": 30, "every": 2, "stop": 0.5}
TOKENS = torch.arange(2, 34)[None] * 5 % 96


def learned(model, out, text, *, options=None, **fields):
    options = {"learned": FAST | (options or {})}
    fields = {"method": "two-sided", "keep": 0.8} | fields
    return run(model, out, text, allocation="learned", options=options, **fields)


@pytest.fixture(scope="module")
def first(llama3, text, tmp_path_factory):
    """Run in one process and one shard."""
    return learned(llama3, tmp_path_factory.mktemp("first") / "out", text, shards=1)


@pytest.mark.parametrize("case", ["svd-llm pivoted", "two-sided pivoted"])
def test_cuts_in_the_learned_order_are_sound(case, llama2, text, tmp_path):
    """Errors in the report are those of the files where directions are orthogonal, and the pivoted
    form is that of the cut; a later stage trains what the order has kept."""
    method, _, storage = case.partition(" ")
    fields = {"method": method, "storage": storage or "plain"}
    found = learned(llama2, tmp_path / "out", text, **fields)
    assert verify(found.out, against=llama2, linears=20)["problems"] == []
    assert bool(load(found.out)(input_ids=TOKENS).logits.isfinite().all())
    refined = retarget(
        found.run_dir,
        tmp_path / "refined",
        executor="local",
        refine="blocks",
        options={"learned": FAST, "refinement": {"epochs": 1}},
    )
    assert refined.plan == found.plan
    tensors = load_file(found.out / "model.safetensors")
    for name, tensor in load_file(refined.out / "model.safetensors").items():
        assert tensor.shape == tensors[name].shape
        if tensor.dim() == 2:
            change = (tensor - tensors[name]).float().norm()
            assert change < 0.2 * tensors[name].float().norm()


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_families_have_gates(family, request, text, tmp_path):
    """Transposed weights, biases, and experts that a step may not reach."""
    written = request.getfixturevalue("moe_checkpoint" if "moe" in family else "checkpoint")
    model = with_tokenizer(written(family), tmp_path / "dense")
    found = learned(model, tmp_path / "out", text, keep=0.7, options={"stop": 0.6})
    assert found.report["learn"]["kept"] <= 0.6
    assert verify(found.out, against=model)["problems"] == []


def test_what_was_not_learned_is_refused(first, llama2, text, tmp_path):
    """Below `stop` at once; where the steps ended before it, below the size that was reached, which
    is extrapolated if that is allowed; in one line each."""
    cut = {"executor": "local"}
    with pytest.raises(UsageError, match=r"keep: 0\.4 is below 0\.5"):
        retarget(first.run_dir, tmp_path / "cut", keep=0.4, **cut)
    with pytest.raises(InfeasibleError, match=r"smallest learned size is 1\.0"):
        learned(llama2, tmp_path / "out", text, options={"steps": 2})
    allowed = {"learned": {"below_stop": "allow"}}
    events = []
    found = retarget(
        tmp_path / "out.run",
        tmp_path / "cut",
        keep=0.6,
        options=allowed,
        on_event=events.append,
        **cut,
    )
    report = found.report["learn"]
    assert (report["stop"], report["kept"], report["extrapolated"]) == ("end", 1.0, True)
    assert not any(e["event"] == "unit" and e["stage"] == "learn" for e in events)


def test_what_cannot_be_learned_is_refused(llama2, text, tmp_path):
    """A shared basis, one sequence, and a loss that is not finite, each in one line."""
    with pytest.raises(UsageError, match="gives several linears one basis"):
        learned(llama2, tmp_path / "out", text, method="basis-sharing")
    with pytest.raises(UsageError, match="samples is 1, and learned learns on some sequences"):
        learned(llama2, tmp_path / "out", text, samples=1)
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:100])
    with pytest.raises(UsageError, match="there is 1 sequence; two are needed"):
        learned(llama2, tmp_path / "out", short, sequence_length=64, samples=None)
    model = with_tokenizer(llama2, tmp_path / "dense")
    tensors = load_file(model / "model.safetensors")
    head = next(name for name in tensors if name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert "lm_head.weight" in tensors, head
    save_file(
        tensors | {"lm_head.weight": torch.full_like(tensors["lm_head.weight"], 3e38)},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match="learn: the loss or a gradient is not finite"):
        learned(model, tmp_path / "out", text, method="svd-llm")


def test_a_divergence_is_from_the_dense_model(llama2, text, tmp_path):
    """With all gates open it is 0 to rounding, and it grows as gates close; targets are stored."""
    found = learned(llama2, tmp_path / "out", text, options={"divergence": 0.5})
    parts = [each["divergence"] for each in found.report["learn"]["snapshots"]]
    assert abs(parts[0]) < 1e-6 < parts[-1]
    assert json.dumps(found.report["learn"])
