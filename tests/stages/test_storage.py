"""Whole runs with factors that are stored pivoted."""

import shutil

import pytest
import torch
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.hf.export import export_dense

TOKENS = torch.arange(2, 34)[None] * 5 % 96


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=2)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Pivoted run in one shard; not to be changed."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return run(llama, out, text, storage="pivoted", shards=1)


def errors(result):
    return {n: entry["activation_error"] for n, entry in result.report["linears"].items()}


@torch.no_grad()
def logits(directory):
    return orchestrator.load(directory)(TOKENS).logits


def test_a_budget_buys_more_of_every_linear(llama, text, tmp_path):
    """At the same values every linear loses less; the values counted are those stored."""
    plain = run(llama, tmp_path / "plain", text, keep=0.6)
    pivoted = run(llama, tmp_path / "pivoted", text, keep=0.6, storage="pivoted")
    before, after = errors(plain), errors(pivoted)
    assert all(after[name] < before[name] for name in before)
    values = pivoted.report["values"]
    assert values["stored"] <= values["budget"] == plain.report["values"]["budget"]
    model = orchestrator.load(pivoted.out)
    assert values["model_after"] == sum(each.numel() for each in model.parameters())
    indices = sum(index.nbytes for name, index in model.named_buffers() if "index" in name)
    assert pivoted.report["bytes"]["stored"] == 4 * values["stored"] + indices


@pytest.mark.parametrize("method", ["svd-llm", "asvd"])
def test_pivoting_loses_nothing(method, llama, text, tmp_path):
    """The written weight is the product of the decomposition's factors at this rank, to
    rounding."""
    options = {"allocation": "uniform", "storage": "pivoted"}
    result = run(llama, tmp_path / "out", text, method=method, keep=0.9, **options)
    model = orchestrator.load(result.out)
    for name, entry in result.report["linears"].items():
        (path,) = result.run_dir.rglob(f"{name}.safetensors")
        stored = load_file(path)
        assert len(stored["down"]) == min(entry["shape"]) > entry["rank"]
        expected = stored["weight"][: entry["rank"]].T @ stored["down"][: entry["rank"]]
        gap = (model.get_submodule(name).dense_weight().detach() - expected).norm()
        assert float(gap / expected.norm()) < 2e-6


def test_what_pivoting_measured_is_what_was_written(llama, text, tmp_path):
    """The report's errors are those of the stored parts against the product, in their dtype."""
    result = run(llama, tmp_path / "out", text, storage="pivoted", output_dtype="bfloat16")
    linears = result.report["linears"].items()
    measured = {n: entry["numerics"]["pivot"] for n, entry in linears if entry["form"] == "pivoted"}
    assert result.report["pivot"]["linears"] == len(measured) > 0
    assert result.report["pivot"]["error"] == max(said["error"] for said in measured.values())
    model = orchestrator.load(result.out, dtype=torch.bfloat16)
    for name, said in measured.items():
        (path,) = result.run_dir.rglob(f"{name}.safetensors")
        rank = result.report["linears"][name]["rank"]
        stored = {part: rows[:rank].double() for part, rows in load_file(path).items()}
        product_OI = stored["weight"].T @ stored["down"]
        written_OI = model.get_submodule(name).double().dense_weight().detach()
        gap = float((written_OI - product_OI).norm() / product_OI.norm())
        assert said["error"] == pytest.approx(gap, rel=1e-6)
        assert 0 < gap < 2**-6
        assert said["largest"] <= 1.1


def test_one_damaged_linear_is_pivoted_again(llama, text, reference, tmp_path):
    """Every linear is a unit of its own: only the one with a changed file is made again."""
    run_dir, events = shutil.copytree(reference.run_dir, tmp_path / "run"), []
    damaged = sorted(run_dir.rglob("pivoted.safetensors"))[2]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    fields = {"storage": "pivoted", "run_dir": str(run_dir), "on_event": events.append}
    result = run(llama, tmp_path / "out", text, **fields)
    made = [each["unit"] for each in events if each["event"] == "unit" and each["stage"] == "pivot"]
    assert len(made) == 1
    assert contents(result.out) == contents(reference.out)


def test_every_way_writes_the_same_bytes(llama, text, reference, tmp_path):
    """Other shards, and a second run from the same units, give the same bytes."""
    cut = run(llama, tmp_path / "cut", text, storage="pivoted", shards=2)
    assert contents(cut.out) == contents(reference.out)


def test_plain_and_pivoted_decompositions_are_apart(llama, text, tmp_path):
    """Pivoted ranks go further, so plain units are neither used nor changed."""
    shared = {"run_dir": str(tmp_path / "run")}
    plain = contents(run(llama, tmp_path / "one", text, **shared).out)
    run(llama, tmp_path / "pivoted", text, storage="pivoted", **shared)
    assert contents(run(llama, tmp_path / "two", text, **shared).out) == plain


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_families_are_pivoted_alike(family, checkpoint, text, tmp_path):
    """Biases and transposed weights: logits equal those of the dense export."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = run(model, tmp_path / "out", text, keep=0.9, storage="pivoted")
    assert {entry["form"] for entry in result.report["linears"].values()} == {"pivoted"}
    export_dense(result.out, tmp_path / "export")
    expected = logits(tmp_path / "export")
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(result.out), expected, rtol=0, atol=tolerance)


def test_a_fit_is_written_pivoted(llama, text, tmp_path):
    """Refitted left factors are pivoted after the refit: the weights differ from unfitted ones."""
    options = {"basis-sharing": {"group": 1, "refit": "always"}}
    fields = {"method": "basis-sharing", "options": options, "keep": 0.4}
    fitted = run(llama, tmp_path / "fitted", text, storage="pivoted", **fields)
    cut = run(llama, tmp_path / "cut", text, storage="pivoted", keep=0.4)
    assert errors(fitted) == errors(cut)
    name = "model.layers.1.mlp.up_proj"
    bases = []
    for result in (fitted, cut):
        module = orchestrator.load(result.out).get_submodule(name)
        assert module.is_sound()
        bases.append(torch.linalg.svd(module.dense_weight().detach().double())[2][: module.rank])
    # a refit changes only the left factor: both weights use the same input directions
    torch.testing.assert_close(bases[0].T @ bases[0], bases[1].T @ bases[1], rtol=0, atol=1e-4)
    assert not torch.equal(logits(fitted.out), logits(cut.out))


def test_a_budget_of_bytes_counts_the_order(llama, text, tmp_path):
    """Stored bytes, orders included, are within the given bytes, and near them."""
    result = run(llama, tmp_path / "out", text, keep=None, keep_bytes=0.5, storage="pivoted")
    found = result.report["bytes"]
    assert 0.45 * found["dense_linears"] < found["stored"] <= 0.5 * found["dense_linears"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "wanda"}, "storage is 'pivoted', .* wanda keeps entries"),
        ({"method": "cap"}, "storage is 'pivoted', .* cap keeps entries"),
        ({"method": "basis-sharing"}, "basis-sharing's group is 2"),
        ({"storage": "folded"}, "storage is 'folded'; it must be one of pivoted, plain"),
    ],
)
def test_what_cannot_be_pivoted_is_refused(fields, message, llama, text, tmp_path):
    """Entries, bases of several linears, and an unknown storage."""
    with pytest.raises(UsageError, match=message):
        run(llama, tmp_path / "out", text, **{"storage": "pivoted", **fields})
