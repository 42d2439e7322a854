"""REAP: saliencies, experts that are dropped, and the checkpoints without them."""

import copy
import json
import shutil

import pytest
import torch
from moe.families import BLOCKS, EXPERTS, make_moe
from pipeline import add_tokenizer, run, token_chunks, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # compressed checkpoints are loaded by transformers
from orchestrator import export, retarget, verify
from orchestrator.errors import InputError, UsageError
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.forms.base import StoredForm
from orchestrator.models.forms.config import misfits

TOKENS = torch.arange(3, 23)[None] * 3 % 96


@pytest.fixture(scope="module")
def places(moe_checkpoint, tmp_path_factory):
    """Dense models of two families with a tokenizer, one of them with biases, and a text."""
    root = tmp_path_factory.mktemp("reap")
    for family in ("qwen3_moe", "gpt_oss"):
        add_tokenizer(shutil.copytree(moe_checkpoint(family), root / family))
    write_text(root / "text.txt")
    return root


@pytest.fixture(scope="module")
def pruned(places):
    """Results of REAP at half of the experts: of Qwen3-MoE without their rows of the router, as
    published; of GPT-OSS, which has biases, with the router as it is."""
    zero = {"options": {"reap": {"router": "zero"}}}
    text = {"text": places / "text.txt", "method": "reap", "shards": 2}
    return {
        family: run(places / family, places / f"{family}-out", **text, **options)
        for family, options in (("qwen3_moe", {}), ("gpt_oss", zero))
    }


def logits_of(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits


def without(family, plan):
    """Make a dense model whose dropped experts have weights and biases of zero."""
    model = make_moe(family)
    replace_experts(model)
    for name, assigned in plan.assignments.items():
        if assigned.form == "dropped":
            for parameter in model.get_submodule(name).parameters():
                parameter.data.zero_()
    return model


def smaller(family, plan):
    """Make a model of the class with the kept experts, from slices of the fused tensors."""
    dense = make_moe(family)
    config = copy.deepcopy(dense.config)
    config.num_experts = EXPERTS // 2
    state = dense.state_dict()
    for block in range(BLOCKS):
        experts = f"model.layers.{block}.mlp.experts"
        downs = [plan.assignments[f"{experts}.{number}.down"].form for number in range(EXPERTS)]
        kept = [number for number, form in enumerate(downs) if form == "dense"]
        for name in (f"{experts}.gate_up_proj", f"{experts}.down_proj"):
            state[name] = state[name][kept]
        gate = f"model.layers.{block}.mlp.gate.weight"
        state[gate] = state[gate][kept]
    model = type(dense)(config).eval()
    model.load_state_dict(state)
    return model


def test_the_saliency_is_the_mean_weighted_norm(pruned, places):
    """By plain sums over the whole model: router's weight times norm of the output, over the tokens
    that are routed to the expert, biases included."""
    dense = make_moe("gpt_oss")
    replace_experts(dense)
    seen = {}
    for name, module in dense.named_modules():
        if name.endswith(".down"):
            experts = dense.get_submodule(name.rsplit(".", 2)[0])

            def keep(module, inputs, output, name=name, experts=experts):
                norms = output.double().norm(dim=1) * experts.routed.weights_N.double()
                seen.setdefault(name.rpartition(".")[0], []).append(norms)

            module.register_forward_hook(keep)
    with torch.no_grad():
        for chunk in token_chunks(places / "gpt_oss", places / "text.txt"):
            dense(input_ids=chunk.tokens)
    report = pruned["gpt_oss"].report
    assert len(seen) > BLOCKS
    for name in report["experts"]["tokens"]:
        expected = float(torch.cat(seen[name]).mean()) if name in seen else 0.0
        for part in ("gate", "up", "down"):
            found = report["linears"][f"{name}.{part}"]["numerics"]["saliency"]
            assert found == pytest.approx(expected, rel=1e-5)


def test_each_block_loses_the_least_salient(pruned):
    """Half of the experts of every block; none that stays is less salient than one that goes."""
    linears = pruned["qwen3_moe"].report["linears"]
    for block in range(BLOCKS):
        found = {}
        for expert in range(EXPERTS):
            parts = [
                linears[f"model.layers.{block}.mlp.experts.{expert}.{part}"]
                for part in ("gate", "up", "down")
            ]
            (form,) = {each["form"] for each in parts}
            found.setdefault(form, []).append(parts[0]["numerics"]["saliency"])
        assert len(found["dropped"]) == len(found["dense"]) == EXPERTS // 2
        assert max(found["dropped"]) <= min(found["dense"])


def test_a_token_that_is_routed_again_takes_as_many_experts(pruned):
    """Nothing is faster; with half of the experts gone and the router as it is, twice as much."""
    for family, speed in (("qwen3_moe", 1), ("gpt_oss", 2)):
        assert pruned[family].speed_forecast["at_most"] == {"prefill": speed, "decode": speed}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_dropped_experts_are_gone(family, pruned, tmp_path):
    """Logits are those of a smaller model of the class, or of the dense one with zeros in their
    place; their guard says so, and the loaded model saves the same checkpoint again."""
    result = pruned[family]
    loaded, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values()), info
    reference = smaller if family == "qwen3_moe" else without
    with torch.no_grad():
        expected = reference(family, result.plan)(TOKENS).logits
        found = loaded(TOKENS).logits
        loaded.generate(TOKENS, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    stored = load_file(result.out / "model.safetensors")
    gone = {name for name, each in result.plan.assignments.items() if each.form == "dropped"}
    assert not [key for key in stored if key.rpartition(".")[0] in gone]
    guard = stored["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(EXPERTS):
        is_gone = f"model.layers.1.mlp.experts.{expert}.up" in gone
        assert guard[:, expert].tolist() == ([-1] * 3 if is_gone else [0] * 3)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(tmp_path / "again"), found)
    again = load_file(tmp_path / "again/model.safetensors")
    assert {key: each.shape for key, each in again.items()} == {
        key: each.shape for key, each in stored.items()
    }


def test_the_export_without_rows_is_a_smaller_model(pruned, tmp_path):
    """Names on disk are the family's, the config has the number of experts, and no part needs this
    package."""
    export(pruned["qwen3_moe"].out, tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_bytes())
    assert "quantization_config" not in config
    dense = smaller("qwen3_moe", pruned["qwen3_moe"].plan)
    dense.save_pretrained(tmp_path / "reference")
    found, expected = (
        load_file(tmp_path / each / "model.safetensors") for each in ("dense", "reference")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "dense"), dense(TOKENS).logits)


def test_the_export_with_the_router_has_zeros(pruned, tmp_path):
    """Its layout is that of the dense model."""
    export(pruned["gpt_oss"].out, tmp_path / "dense")
    assert torch.equal(logits_of(tmp_path / "dense"), logits_of(pruned["gpt_oss"].out))
    config = json.loads((tmp_path / "dense/config.json").read_bytes())
    assert config["num_local_experts"] == EXPERTS


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_other_verbs_know_dropped_experts(family, pruned, places, tmp_path):
    """`verify` finds no problem, and `retarget` keeps more experts of the same ranking."""
    result = pruned[family]
    assert verify(result.out, against=places / family)["problems"] == []
    larger = retarget(result.run_dir, tmp_path / "larger", keep=0.75, executor="local")
    assert verify(larger.out, against=places / family)["problems"] == []
    kept = {n for n, each in result.plan.assignments.items() if each.form == "dense"}
    more = {n for n, each in larger.plan.assignments.items() if each.form == "dense"}
    assert kept < more
    assert len(more) == 3 * BLOCKS * (EXPERTS - 1)
    assert larger.plan.reroutes == (family == "qwen3_moe")


def test_a_router_of_groups_is_refused(moe_checkpoint, places, tmp_path):
    """DeepSeek's compares groups of experts, which fewer would not form; the message says what
    does."""
    model = add_tokenizer(shutil.copytree(moe_checkpoint("deepseek_v3"), tmp_path / "dense"))
    with pytest.raises(UsageError, match=r"router does not choose.*--option reap.router=zero"):
        run(model, tmp_path / "out", places / "text.txt", method="reap")


def test_later_stages_pass_dropped_experts(places, tmp_path):
    """A router that lost rows is trained with the rest, and the files are as reported."""
    options = {"training": {"epochs": 2, "batches": 1, "every": 2, "learning_rate": 1e-3}}
    settings = {"samples": 2, "method": "reap", "train": "light", "options": options}
    result = run(places / "qwen3_moe", tmp_path / "out", places / "text.txt", **settings)
    assert verify(result.out, against=places / "qwen3_moe")["problems"] == []


def test_a_model_without_experts_is_refused(checkpoint, tmp_path):
    """Nothing could be dropped; the message names the method."""
    model = add_tokenizer(shutil.copytree(checkpoint("llama"), tmp_path / "dense"))
    with pytest.raises(UsageError, match=r"reap is for experts, and .* has none"):
        run(model, tmp_path / "out", write_text(tmp_path / "text.txt"), method="reap")


def test_experts_are_dropped_as_a_whole(places, pruned, tmp_path):
    """A part of an expert is no target, and no config has one."""
    settings = {"method": "reap", "target": ("*.down",)}
    with pytest.raises(UsageError, match=r"not targeted.*dropped as a whole"):
        run(places / "qwen3_moe", tmp_path / "out", places / "text.txt", **settings)
    gone = StoredForm(form="dropped")
    for names in (["e.0.up"], ["e.0.down"], ["mlp.up", "mlp.down"], ["q_proj"]):
        forms = dict.fromkeys(names, gone)
        assert [*misfits(forms, dict.fromkeys(names, (8, 8)))], names
    changed = shutil.copytree(pruned["qwen3_moe"].out, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_bytes())
    experts = config["quantization_config"]["experts"]["model.layers.0.mlp.experts"]
    experts["gate"] = {"form": [""] * EXPERTS, "rank": [1, *[0] * (EXPERTS - 1)]}
    experts["gate"]["form"][0] = "low_rank"
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, ValueError), match="dropped"):
        AutoModelForCausalLM.from_pretrained(changed)
