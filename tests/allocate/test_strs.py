"""STRS: the search against brute force, sensitivities against whole models, and whole runs."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from allocation import assert_invariants, make_curve, make_linears, make_model
from drivers import Driver, is_unit, units
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from pools import several
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.strs import Strs
from orchestrator.errors import InfeasibleError, InputError, StoppedError, UsageError
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import LOW_RANK

SHAPES = st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=5)


def measured(linears, strs, draw):
    """Make curves with drawn sensitivities; `draw` gives one per trial."""
    losses = {linear.name: {rank: draw() for rank in strs.ranks(linear)} for linear in linears}
    return {name: make_curve(name, [1.0], sensitivities=each) for name, each in losses.items()}


def plan_of_cut(linears, curves, strs, rejected):
    """Compute by definition the plan after rejecting the first trials of the list."""
    trials = [(curves[x.name].sensitivities[r], x.name, r) for x in linears for r in strs.ranks(x)]
    trials.sort(key=lambda trial: -trial[0])
    sizes = {}
    for linear in linears:
        ranks = [rank for _, name, rank in trials[rejected:] if name == linear.name]
        sizes[linear.name] = min(ranks) * linear.rank_cost if ranks else linear.values
    return sizes


@given(shapes=SHAPES, percent=st.integers(1, 100), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_the_search_is_the_last_cut_that_fits(shapes, percent, seed):
    """The plan is the cut of the sorted list, among all cuts, with the most stored values."""
    linears, strs = make_linears(shapes), Strs(grid="0.2 0.5 0.7 0.9")
    # few values, so that some losses are equal
    rng = np.random.default_rng(seed)
    curves = measured(linears, strs, lambda: float(rng.integers(0, 12)))
    count = sum(len(strs.ranks(linear)) for linear in linears)
    cuts = [plan_of_cut(linears, curves, strs, rejected) for rejected in range(count + 1)]
    budget = Budget(percent / 100).share(linears)
    feasible = [cut for cut in cuts if sum(cut.values()) <= budget]
    totals = [sum(cut.values()) for cut in cuts]
    assert totals == sorted(totals)
    if not feasible:
        with pytest.raises(InfeasibleError):
            strs(linears, curves, Budget(percent / 100), {})
        return
    plan = strs(linears, curves, Budget(percent / 100), {})
    assert_invariants(plan, linears, percent / 100)
    found = {each.name: plan.assignments[each.name].stored_values(each) for each in linears}
    assert found == feasible[-1]


def test_sensitive_linears_keep_more():
    """The more sensitive of two equal linears is truncated less; a noisy trial is never chosen."""
    one, two = linears = make_linears([(40, 40), (40, 40)])
    strs = Strs(grid="0.4 0.6 0.8")
    curves = {
        one.name: make_curve(one.name, [1.0], sensitivities={8: 9.0, 12: 6.0, 16: 3.0}),
        # rank 16 is worse than rank 12 by chance, and never taken
        two.name: make_curve(two.name, [1.0], sensitivities={8: 2.0, 12: 1.0, 16: 1.5}),
    }
    ranks = []
    for keep in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        plan = strs(linears, curves, Budget(keep), {})
        ranks.append([plan.assignments[each.name].rank for each in linears])
    # 0 is dense
    assert ranks == [[8, 8], [12, 8], [16, 8], [0, 8], [0, 12], [0, 12]]


def test_the_grid_gives_ranks_below_break_even():
    """Equal ranks are one trial, rank 0 is none, and break-even is never reached."""
    strs = Strs(grid="0.01, 0.4, 0.41, 0.999999")
    small, tiny, wide = make_linears([(10, 10), (2, 2), (576, 1536)])
    assert strs.ranks(small) == (2, 4)
    assert strs.ranks(tiny) == ()
    assert strs.ranks(wide) == (4, 167, 171, LOW_RANK.break_even(wide) - 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grid": "0.6 0.4"}, "ascending"),
        ({"grid": ""}, "at least one number"),
        ({"grid": "0.4 0.4"}, "ascending"),
        ({"grid": "0.4 x"}, "must be numbers"),
        ({"grid": 0.4}, "must be words"),
        ({"grid": "0.4 1"}, "0.999999"),
        ({"windows": 0}, "whole number"),
        ({"windows": 1.5}, "whole number"),
    ],
)
def test_options_are_checked(options, said):
    """The message has the allowed values."""
    with pytest.raises(UsageError, match=said):
        Strs(**options)


def test_a_sensitivity_that_is_not_there_is_an_error():
    """The message for a missing or non-finite sensitivity names linear and rank."""
    linears = make_model({"q": (40, 40)}, 2)
    for losses, said in [
        ({8: 1.0}, "rank 16 is missing"),
        ({8: 1.0, 16: np.nan}, "rank 16 is nan"),
    ]:
        curves = {x.name: make_curve(x.name, [1.0], sensitivities=losses) for x in linears}
        with pytest.raises(InputError, match=said):
            Strs(grid="0.4 0.8")(linears, curves, Budget(0.8), {})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=3, hidden=32)


OPTIONS = {"grid": "0.4 0.8"}


def compress(model, out, text, **fields):
    return run(model, out, text, **{"method": "asvd", "options": {"strs": OPTIONS}} | fields)


@pytest.fixture(scope="module")
def half(llama, text, tmp_path_factory):
    """The result in one process, cut into two shards; not to be changed."""
    return compress(llama, tmp_path_factory.mktemp("half") / "out", text, shards=2)


@pytest.fixture(scope="module")
def reference(half):
    return contents(half.out)


def stored_factors(run_dir):
    """Content of the decomposition units, by linear."""
    found = run_dir.glob("units/*/*/*_proj.safetensors")
    return {path.name.removesuffix(".safetensors"): load_file(path) for path in found}


def windows_of(text, directory, count=2, length=48):
    ids = load_tokenizer(directory)(text.read_text())["input_ids"][: count * length]
    return torch.tensor(ids).view(count, length)


@torch.no_grad()
def cause_of_loss(model, rows):
    """Mean cross-entropy of every next token, in float64."""
    losses = [
        cross_entropy(model(input_ids=row[None]).logits[0, :-1].double(), row[1:], reduction="sum")
        for row in rows
    ]
    return float(sum(losses)) / (rows.numel() - len(rows))


@pytest.mark.parametrize("method", ["asvd", "svd-llm"])
def test_sensitivities_are_those_of_whole_models(method, half, llama, text, tmp_path):
    """Each sensitivity is the loss of the whole model with that one weight truncated."""
    fields = {"method": method, "allocation": "strs", "shards": 3}
    result = half if method == "asvd" else compress(llama, tmp_path / "out", text, **fields)
    report = result.report["strs"]
    model, rows = AutoModelForCausalLM.from_pretrained(llama).eval(), windows_of(text, llama)
    assert report["dense_loss"] == pytest.approx(cause_of_loss(model, rows), rel=1e-5)
    factors = stored_factors(result.run_dir)
    assert factors.keys() == report["losses"].keys()
    for name, losses in report["losses"].items():
        weight = model.get_submodule(name).weight.data
        whole = weight.clone()
        assert len(losses) == 2
        for rank, loss in losses.items():
            parts = {part: rows[: int(rank)] for part, rows in factors[name].items()}
            weight.copy_(parts["weight"].T @ parts["down"])
            assert loss == pytest.approx(cause_of_loss(model, rows), rel=1e-5)
        weight.copy_(whole)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_other_families_are_measured_too(family, checkpoint, text, tmp_path):
    """Transposed weights, biases, tied embeddings: trials are those of the whole model."""
    directory = with_tokenizer(checkpoint(family), tmp_path / "dense")
    fields = {"allocation": "strs", "options": {"strs": {"grid": "0.5"}}, "keep": 0.9}
    report = compress(directory, tmp_path / "out", text, **fields).report["strs"]
    model, rows = (
        AutoModelForCausalLM.from_pretrained(directory).eval(),
        windows_of(text, directory),
    )
    units = tmp_path.glob("out.run/units/*/*/*.safetensors")
    factors = {p.name.removesuffix(".safetensors"): load_file(p) for p in units}
    for name, losses in report["losses"].items():
        ((rank, loss),) = losses.items()
        weight = dense_weight(model.get_submodule(name))
        whole, parts = weight.clone(), {k: v[: int(rank)] for k, v in factors[name].items()}
        weight.copy_(parts["weight"].T @ parts["down"])
        assert loss == pytest.approx(cause_of_loss(model, rows), rel=1e-5)
        weight.copy_(whole)


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 3)])
def test_cut_and_workers_change_no_bit(
    workers, shards, llama, text, reference, tmp_path, monkeypatch
):
    """For every cut of the trial pass, and with workers that share no object, checkpoint and
    report are byte-identical."""
    several(monkeypatch, size=workers)
    compress(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == reference


TRIALS = 3 * 7 * 2 + 1
"""Three blocks of seven linears at two sizes, and the dense model."""


@pytest.mark.parametrize("shards", [1, 3])
def test_no_trial_is_taken_twice(shards, llama, text, reference, tmp_path):
    """A run stopped after some trials continues with the others, to the same bytes."""

    def stop(event):
        if is_unit(20, "score")(event):
            raise StoppedError("here")

    with pytest.raises(StoppedError):
        compress(llama, tmp_path / "out", text, shards=shards, on_event=stop)
    events = []
    compress(llama, tmp_path / "out", text, shards=shards, on_event=events.append)
    assert contents(tmp_path / "out") == reference
    assert units(events, "score") == TRIALS - 20


@pytest.mark.chaos
def test_a_killed_driver_takes_no_trial_twice(llama, text, reference, tmp_path):
    """After SIGKILL committed trials are kept: the same command does only the others."""
    flags = ("--method", "asvd", "--option", "strs.grid=0.4 0.8", "--executor", "local")
    driver = Driver(llama, tmp_path / "out", text, *flags, "--shards", "2")
    assert driver.until(is_unit(12, "score"))
    driver.kill()
    events = []
    compress(llama, tmp_path / "out", text, shards=2, on_event=events.append)
    assert contents(tmp_path / "out") == reference
    assert 0 < units(events, "score") <= TRIALS - 12


@pytest.mark.ray
@pytest.mark.chaos
def test_a_killed_actor_changes_no_byte(llama, text, reference, tmp_path, ray_address):
    """Another worker continues the trials of a lost shard from the same dense states."""
    events, killed = [], []

    def kill(event):
        events.append(event)
        if is_unit(10, "score")(event):
            pids = [each["pid"] for e in events if e["event"] == "workers" for each in e["workers"]]
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    fields = {"executor": "ray", "workers": 2, "shards": 4}
    compress(llama, tmp_path / "out", text, on_event=kill, **fields)
    assert contents(tmp_path / "out") == reference
    assert killed
    assert any(event["event"] == "lost" for event in events)
    assert units(events, "score") == TRIALS


def test_a_damaged_boundary_is_made_again(llama, text, reference, tmp_path, monkeypatch):
    """If the chunks from which trials start are lost, earlier blocks run once more."""
    lost = []

    def damage(event):
        if is_unit(1, "score")(event):
            lost.extend((tmp_path / "out.run" / "chunks").glob("*/*/*.safetensors"))
            for path in lost[::2]:
                path.unlink()
            for path in lost[1::2]:
                path.write_bytes(b"damaged")

    # a chunk that is missing is not on its way from another worker
    monkeypatch.setattr("orchestrator.store.chunks.WRITING_SECONDS", 0.02)
    compress(llama, tmp_path / "out", text, shards=2, on_event=damage)
    assert lost
    assert contents(tmp_path / "out") == reference


def test_no_chunk_stays_at_the_boundaries(half):
    """The pass leaves its units and no chunk."""
    assert not list(half.run_dir.glob("chunks/*/*/*"))


def test_another_size_takes_no_trial(llama, text, run_dir, tmp_path):
    """A second size from one run directory needs no trial, and a finer grid only its new ones."""
    events = []
    fields = {"keep": 0.7, "run_dir": run_dir, "on_event": events.append}
    compress(llama, tmp_path / "more", text, **fields)
    assert not units(events, "score")
    compress(llama, tmp_path / "direct", text, keep=0.7)
    assert contents(tmp_path / "more") == contents(tmp_path / "direct")
    finer = {"strs": {"grid": "0.4 0.6 0.8"}}
    compress(llama, tmp_path / "finer", text, options=finer, **fields)
    assert units(events, "score") == 3 * 7
    compress(llama, tmp_path / "fresh", text, options=finer, keep=0.7)
    assert contents(tmp_path / "finer") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("keep", [0.4, 0.55, 0.8, 1.0])
def test_every_budget_is_met_from_below(keep, llama, text, run_dir, tmp_path):
    """Stored values are within the budget, and less than a step below it."""
    report = compress(llama, tmp_path / "out", text, keep=keep, run_dir=run_dir).report
    values, entries = report["values"], report["linears"].values()
    assert sum(entry["values"] for entry in entries) == values["stored"] <= values["budget"]
    assert values["slack"] <= 0.6 * max(np.prod(entry["shape"]) for entry in entries)
    assert ({entry["form"] for entry in entries} == {"dense"}) == (keep == 1.0)


@pytest.mark.parametrize("fields", [{"storage": "pivoted"}, {"keep": None, "keep_bytes": 0.6}])
def test_other_budgets_are_met_from_below(fields, llama, text, run_dir, tmp_path):
    """Pivoted ranks are tried at their size; bytes of factors are those of values."""
    result = compress(llama, tmp_path / "out", text, **{"keep": 0.6, "run_dir": run_dir} | fields)
    linears = LazyModel.open(llama).survey().linears
    stored = sum(
        result.plan.assignments[each.name].stored_bytes(each, CODECS["float32"]) for each in linears
    )
    values = result.report["values"]
    assert values["stored"] <= values["budget"] == Budget(0.6).share(linears)
    assert stored == 4 * values["stored"] or "storage" in fields
    forms = {entry["form"] for entry in result.report["linears"].values()}
    assert forms == {"dense", fields.get("storage", "low_rank")}


def test_a_budget_below_the_grid_is_said_first(llama, text, tmp_path):
    """The error comes before any computation, names the remedy, and no file is written."""
    with pytest.raises(InfeasibleError, match=r"grid, 0\.4, stores .* begins lower"):
        compress(llama, tmp_path / "out", text, keep=0.3)
    assert not list((tmp_path / "out.run").glob("units/*"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd-llm", {}),
        ("two-sided", {}),
        ("basis-sharing", {"basis-sharing": {"group": 2, "refit": "never"}}),
    ],
)
def test_other_methods_are_divided_by_it(method, options, llama, text, tmp_path):
    """Linears with a shared basis are one trial; any cut of the model gives the same bytes."""
    options = {"strs": {"grid": "0.4"}} | options
    for shards in (1, 2):
        fields = {"method": method, "allocation": "strs", "options": options, "shards": shards}
        result = compress(llama, tmp_path / f"out{shards}", text, **fields)
        assert result.plan.stored_values <= result.plan.budget_values
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    groups = {entry.get("basis", "") for entry in result.report["linears"].values()}
    assert (groups == {""}) == (method != "basis-sharing")


def test_a_part_of_a_shard_runs_alone(checkpoint):
    """Block by block, starting inside a shard, gives the bits of the whole shard."""
    shard = LazyModel.open(checkpoint("llama")).shard(range(0, 4))
    tokens = torch.arange(2, 50)[None] * 5 % 96
    chunk = Chunk(0, tokens, torch.ones_like(tokens, dtype=torch.bool))
    whole = shard.forward(chunk).payload.output
    passed = chunk
    for start, stop in itertools.pairwise([0, 1, 3, 4]):
        before, passed = passed, shard.forward(passed, part=range(start, stop))
    assert torch.equal(passed.payload.output, whole)
    assert torch.equal(shard.logits(before, part=range(3, 4)), shard.logits(chunk))
    with pytest.raises(ValueError, match="not a contiguous range within"):
        shard.forward(chunk, part=range(2, 5))
