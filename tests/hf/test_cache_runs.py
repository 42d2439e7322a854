"""Runs whose size is that of the cache, and the caches of their results."""

import json

import pytest
import torch
from compressed import TOKENS
from pipeline import run, with_tokenizer, write_text
from transformers import AutoModelForCausalLM

from orchestrator import retarget
from orchestrator.cli.main import main
from orchestrator.hf import latent_attention, latent_cache
from orchestrator.hub.card import published_card
from orchestrator.pages.report import rendered_report
from orchestrator.pages.sources import read_source
from orchestrator.plan.cache_size import cache_bytes

FEW = {"samples": 2, "sequence_length": 16}
TARGET = "*.k_proj,*.v_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def dense(checkpoint, tmp_path_factory):
    return with_tokenizer(checkpoint("llama"), tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def notes():
    """Notes of the run below."""
    return []


@pytest.fixture(scope="module")
def made(dense, text, notes, tmp_path_factory):
    """LoRC at half of the cache; keys and values alone are cut."""
    fields = {"method": "svd", "allocation": "lorc", "keep": None, "keep_cache": 0.5}
    fields["target"] = (TARGET, "*.up_proj")

    def hear(event):
        if event["event"] == "note":
            notes.append(event["text"])

    return run(dense, tmp_path_factory.mktemp("made") / "out", text, on_event=hear, **fields, **FEW)


def sizes_of(model):
    """Return the bytes of a token in the two caches of a model, measured on their tensors."""
    found = {}
    for kind in ("values", "latent"):
        cache = latent_cache(latent_attention(model) if kind == "latent" else model)
        with torch.no_grad():
            model(TOKENS, past_key_values=cache)
        assert cache.stored_bytes == TOKENS.numel() * cache.bytes_a_token
        found |= {kind: cache.bytes_a_token, "full": cache.dense_bytes_a_token}
    return found


def test_lorc_keeps_a_fraction_of_the_cache(made, notes):
    """Other linears are said to stay dense. The report's bytes are those of the caches; with
    positions they are above the budget by 4 a block. Ranks fall with depth, and the loaded model
    generates the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(made.out)
    spent = made.report["costs"]["cache"]
    sizes = cache_bytes(made.report)
    cut = {name: each for name, each in made.report["linears"].items() if "rank" in each}
    blocks = sum(name.endswith("k_proj") for name in cut)
    assert any(text.startswith("keep_cache: mlp.up_proj have no cache") for text in notes)
    assert not any("up_proj" in name for name in cut)
    assert spent["dense"] == 4 * 2 * 16
    assert spent["planned"] <= 0.5 * spent["dense"]
    assert sizes == sizes_of(model)
    assert sizes["full"] == 4 * spent["dense"]
    assert sizes["latent"] == 4 * spent["planned"] + 4 * blocks
    ranks = [cut.get(f"model.layers.{b}.self_attn.k_proj", {}).get("rank", 16) for b in range(4)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[3]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(TOKENS, past_key_values=latent_cache(model), **options)
    assert torch.equal(found, model.generate(TOKENS, **options))


def test_the_cache_is_shown(made, capsys):
    """In the result as text and as JSON, on the page and in the card."""
    sizes = cache_bytes(made.report)
    again = ["retarget", str(made.run_dir), str(made.out), "--executor=local", "--keep-cache=0.5"]
    assert main(again) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("kept fraction of the targeted linears, in cache")
    said = f"{sizes['latent']} bytes"
    assert "cache of a token  " in shown
    config = json.loads((made.out / "config.json").read_bytes())
    card = published_card(read_source(made.out), "me/it", config)
    for page in (shown, str(rendered_report(made.out)), card):
        assert said in page
        assert f"{sizes['values']} with those of values alone, {sizes['full']} in full" in page
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache_bytes"] == sizes


def test_a_run_of_all_linears_is_cut_to_a_cache(dense, text, tmp_path):
    """Pivoted keys and values of the default recipe; other linears are dense."""
    whole = run(dense, tmp_path / "whole", text, method=None, keep=0.8, **FEW)
    assert sizes_of(AutoModelForCausalLM.from_pretrained(whole.out)) == cache_bytes(whole.report)
    cut = retarget(whole.run_dir, tmp_path / "cut", keep_cache=0.5, executor="local")
    forms = {name: each["form"] for name, each in cut.report["linears"].items()}
    assert {form for name, form in forms.items() if name[-6:] not in ("k_proj", "v_proj")} == {
        "dense"
    }
    assert "pivoted" in forms.values()
    spent = cut.report["costs"]["cache"]
    assert 0.5 * spent["dense"] - 1 < spent["planned"] <= 0.5 * spent["dense"]
    assert sizes_of(AutoModelForCausalLM.from_pretrained(cut.out)) == cache_bytes(cut.report)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--method=wanda", "--keep-cache=0.5"], 2, "a cache stores latents of factors alone"),
        (["--keep-cache=0.5", "--target=*.up_proj"], 2, "none of 4 targeted linears is a k_proj"),
        (["--allocation=lorc", "--keep=0.5"], 2, "lorc divides keys and values, and model.layers"),
        (["--keep-cache=0.01", f"--target={TARGET}"], 3, "the least possible is 0.0625"),
        (["--allocation=lorc", "--keep-cache=0.5", f"--target={TARGET}"], 0, ""),
    ],
)
def test_plan_refuses_what_has_no_smaller_cache(dense, flags, code, says, capsys):
    """One line says what is wrong, and what to give."""
    method = [] if any("method" in flag for flag in flags) else ["--method=svd"]
    assert main(["plan", str(dense), *method, *flags]) == code
    assert says in capsys.readouterr().err
