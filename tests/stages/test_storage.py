"""Pivoted factors: cost, ranks within a budget, and whole runs."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from allocation import assert_invariants, make_cosines, make_curves, make_linears, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from safetensors.torch import load_file

import orchestrator
from orchestrator.allocate import ALLOCATORS, make_allocator
from orchestrator.allocate.steps import step_costs
from orchestrator.errors import UsageError
from orchestrator.hf.export import export_dense
from orchestrator.plan.plan import Assignment

SIDES = st.integers(1, 60)
ROLES = {"self_attn.q_proj": (48, 48), "self_attn.v_proj": (16, 48), "mlp.down_proj": (48, 96)}
PIVOTED = [replace(each, pivoted=True) for each in make_model(ROLES, blocks=3)]
TOKENS = torch.arange(2, 34)[None] * 5 % 96

every_allocator = pytest.mark.parametrize("name", [name for name in ALLOCATORS if name != "d-rank"])


def linear_of(outputs, inputs, pivoted):
    (linear,) = make_linears([(outputs, inputs)])
    return replace(linear, pivoted=pivoted)


@given(outputs=SIDES, inputs=SIDES, pivoted=st.booleans())
def test_steps_cost_what_ranks_store(outputs, inputs, pivoted):
    """Step r of pivoted factors adds m + n - 2 r + 1 values; steps end with the dense weight."""
    linear = linear_of(outputs, inputs, pivoted)
    costs = step_costs(linear)
    assert costs.dtype == np.int64
    assert costs.min() > 0
    stored = [
        Assignment(form=linear.factored, rank=rank).stored_values(linear)
        for rank in range(len(costs))
    ]
    assert np.cumsum(costs).tolist() == [*stored[1:], linear.values]
    if pivoted and len(costs) > 1:
        ranks = np.arange(1, len(costs))
        assert costs[:-1].tolist() == (outputs + inputs - 2 * ranks + 1).tolist()


@given(outputs=SIDES, inputs=SIDES, pivoted=st.booleans(), data=st.data())
def test_the_rank_within_a_number_of_values_is_the_largest(outputs, inputs, pivoted, data):
    """It stores at most the values; the next rank stores more."""
    linear = linear_of(outputs, inputs, pivoted)
    values = data.draw(st.integers(0, linear.values))
    rank = linear.rank_within(values)
    assert linear.factor_values(rank) <= values
    if not pivoted or rank < linear.break_even:
        assert linear.factor_values(rank + 1) > values


@given(outputs=SIDES, inputs=SIDES, pivoted=st.booleans())
def test_every_rank_below_break_even_saves_values(outputs, inputs, pivoted):
    """Break-even itself saves none."""
    linear = linear_of(outputs, inputs, pivoted)
    for rank in range(1, linear.break_even):
        assert Assignment(form=linear.factored, rank=rank).stored_values(linear) < linear.values
    if pivoted:
        assert linear.factor_values(linear.break_even) == linear.values


@pytest.mark.parametrize(("keep", "gain"), [(0.8, 0.38), (0.6, 0.23), (0.4, 0.127)])
def test_the_same_values_hold_more_ranks(keep, gain):
    """For a square weight 38, 23 and 13 % more at 0.8, 0.6 and 0.4 kept, as in PIFA."""
    ranks = []
    for pivoted in (False, True):
        linear = linear_of(4096, 4096, pivoted)
        plan = make_allocator("uniform", {})([linear], {}, keep, {})
        assert plan.slack_values < linear.rank_cost
        ranks.append(plan.assignments[linear.name].rank)
    assert ranks[1] / ranks[0] - 1 == pytest.approx(gain, abs=0.005)


@every_allocator
@given(percent=st.integers(20, 98), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_allocators_keep_the_laws(name, percent, seed):
    """Pivoted ranks stay within the budget and below break-even; none is stored plain."""
    options = {"mgaa": {"low": 0.1}, "strs": {"grid": "0.1 0.3 0.6 0.8 0.9"}}.get(name, {})
    allocator, keep = make_allocator(name, options), percent / 100
    plan = allocator(PIVOTED, make_curves(PIVOTED, seed), keep, make_cosines(PIVOTED, seed))
    assert_invariants(plan, PIVOTED, keep)
    assert {each.form for each in plan.assignments.values()} <= {"pivoted", "dense"}


@pytest.mark.parametrize("setting", ["exact", "paper"])
def test_one_price_a_rank_is_said_to_be_needed(setting):
    """D-Rank's formulas have one price for every rank, and refuse pivoted ones."""
    with pytest.raises(UsageError, match="d-rank: its formulas want one price"):
        make_allocator("d-rank", {"setting": setting})(PIVOTED, make_curves(PIVOTED), 0.6, {})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=2)


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


def test_one_damaged_linear_is_pivoted_again(llama, text, tmp_path):
    """Every linear is a unit of its own: only the one with a changed file is made again."""
    events = []
    result = run(llama, tmp_path / "out", text, storage="pivoted")
    before = contents(result.out)
    damaged = sorted(result.run_dir.rglob("pivoted.safetensors"))[2]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    shutil.rmtree(result.out)
    run(llama, tmp_path / "out", text, storage="pivoted", on_event=events.append)
    made = [each["unit"] for each in events if each["event"] == "unit" and each["stage"] == "pivot"]
    assert len(made) == 1
    assert contents(result.out) == before


def test_every_way_writes_the_same_bytes(llama, text, tmp_path):
    """Other shards, and a second run from the same units, give the same bytes."""
    whole = run(llama, tmp_path / "whole", text, storage="pivoted", shards=1)
    cut = run(llama, tmp_path / "cut", text, storage="pivoted", shards=2)
    assert contents(cut.out) == contents(whole.out)


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
