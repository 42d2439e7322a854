"""Sparse + low rank in the two-sided norm: losses, pruning order, and whole runs."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from matrices import gaussian, menagerie, of_model
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from pools import several
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram
from orchestrator.linalg.sparsity.two_sided_sparse import (
    DENSE_SHARES,
    RANKS,
    entry_order,
    sparse_low_rank,
)
from orchestrator.linalg.two_sided import decompose_two_sided
from orchestrator.methods import METHODS, make_method
from orchestrator.methods.kinds.sparse_low_rank import SparseLowRankKind
from orchestrator.stages.context.worker.stored import StoredFile

METHOD = METHODS["two-sided-sparse"]
DAMPING = 0.01
TOKENS = torch.arange(2, 34)[None] * 5 % 96


def statistic(specimen, seed=7):
    """Statistic of the specimen's inputs, and of twice as many gradients as outputs."""
    outputs = len(specimen.weight_OI)
    rows_TO = gaussian(2 * outputs, outputs, seed=seed) @ gaussian(outputs, outputs, seed=8)
    return InputGram(specimen.gram_II, curvature=Curvature(rows_TO.T @ rows_TO, len(rows_TO)))


def stored_of(result, path, dtype):
    """The file of a unit with this result."""
    tensors = METHOD.kind.tensors(result, dtype)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
    return StoredFile(path, torch.device("cpu"))


def damped(given):
    c_OO = given.curvature.matrix_KK / given.curvature.gradients
    return c_OO + DAMPING * c_OO.diagonal().mean() * torch.eye(len(c_OO))


def measure(weight_OI, given, densities=(0, 0.3, 0.6), ranks=0.6, fits=False):
    return sparse_low_rank(weight_OI, given, densities, ranks, damping=DAMPING, fits=fits)


def left_out(found, nonzeros):
    """The weight without its first entries."""
    score_OI = found.curvature_O[:, None].double() * found.square_I * found.weight_OI.abs()
    order_N = score_OI.flatten().argsort(descending=True, stable=True)
    rest_N = found.weight_OI.flatten().clone()
    rest_N[order_N[:nonzeros]] = 0
    return rest_N.view_as(found.weight_OI)


@pytest.mark.parametrize("name", menagerie())
def test_losses_are_those_of_the_residual(name):
    """At every point: trace(C D H D^T), trace(D H D^T) and |D|^2 of D = W - S - L."""
    specimen = menagerie()[name]
    given, weight_OI = statistic(specimen), specimen.weight_OI
    found = measure(weight_OI, given)
    c_OO, h_II = damped(given), specimen.gram_II
    whole = found.mixes_P[0]
    for mix in found.mixes_P:
        lost_OI = left_out(found, mix.nonzeros)
        if mix.rank:
            weight_OR, down_RI = found.factors[mix.nonzeros]
            lost_OI = lost_OI - weight_OR[:, : mix.rank] @ down_RI[: mix.rank]
        of_outputs_OO = lost_OI @ h_II @ lost_OI.T
        for measured, expected, scale in (
            (mix.loss, torch.sum(c_OO * of_outputs_OO), whole.loss),
            (mix.activation_loss, of_outputs_OO.trace(), whole.activation_loss),
            (mix.weight_loss, lost_OI.square().sum(), whole.weight_loss),
        ):
            assert measured == pytest.approx(float(expected), rel=1e-4, abs=1e-6 * scale)


def test_points_are_the_densities_and_steps_of_the_rank():
    """Ranks up to the requested fraction of break-even, or to the budget left by the entries."""
    specimen = of_model(40, 30)
    found = measure(specimen.weight_OI, statistic(specimen), (0, 0.5, 0.9), 0.5)
    # break-even is rank 17 of 1200 / 70
    ranks = {0: 8, 600: 8, 1080: 1}
    expected = [
        (count, rank)
        for count, most in ranks.items()
        for rank in sorted({step * most // RANKS for step in range(RANKS + 1)})
    ]
    expected += [(int(share * 1200), 0) for share in (*DENSE_SHARES, 1) if share > 0.9]
    assert [(mix.nonzeros, mix.rank) for mix in found.mixes_P] == expected
    assert {count: down.shape[0] for count, (_, down) in found.factors.items()} == ranks
    assert found.mixes_P[-1].loss == 0


@pytest.mark.parametrize("name", ["tall", "wide", "square", "model"])
def test_the_factors_are_optimal_for_the_entries(name):
    """At every rank the loss is the tail of the squares of C^(1/2) (W - S) H^(1/2)."""
    specimen = menagerie()[name]
    given = statistic(specimen)
    found = measure(specimen.weight_OI, given)
    root_OO = torch.linalg.cholesky(damped(given))
    for mix in found.mixes_P:
        rest_OI = left_out(found, mix.nonzeros)
        sigma_K = torch.linalg.svdvals(root_OO.T @ rest_OI @ specimen.inputs_TI.T).square()
        tail = float(sigma_K[mix.rank :].sum())
        assert mix.loss == pytest.approx(tail, rel=1e-4, abs=1e-6 * found.mixes_P[0].loss)


def test_without_entries_the_factors_are_two_sided():
    """At density 0 factors and losses equal those of `two-sided`."""
    specimen = of_model(12, 20)
    given = statistic(specimen)
    expected = decompose_two_sided(specimen.weight_OI, given, 4, damping=DAMPING)
    found = measure(specimen.weight_OI, given)
    weight_OR, down_RI = found.factors[0]
    torch.testing.assert_close(
        weight_OR @ down_RI, expected.weight_OR @ expected.down_RI, rtol=1e-4, atol=1e-6
    )
    for mix in found.mixes_P:
        if not mix.nonzeros:
            tail = expected.total - float(expected.energies_K[: mix.rank].sum())
            assert mix.loss == pytest.approx(tail, rel=1e-4)


def test_pruning_is_by_both_diagonals():
    """Entries are ordered by C_ii H_jj W_ij^2; equal ones by position."""
    specimen = of_model(9, 7)
    given = statistic(specimen)
    found = measure(specimen.weight_OI, given)
    c_O, h_I = damped(given).diagonal(), specimen.gram_II.diagonal()
    score_OI = c_O[:, None] * h_I * specimen.weight_OI.square()
    expected = score_OI.flatten().argsort(descending=True, stable=True)
    order_N = entry_order(specimen.weight_OI, found.curvature_O, found.square_I)
    assert torch.equal(order_N, expected)
    assert entry_order(torch.ones(2, 3), torch.ones(2), torch.ones(3)).tolist() == [*range(6)]


def test_entries_are_optimal_for_diagonal_statistics():
    """Compared with every choice of the same number of entries."""
    weight_OI, h_I = gaussian(3, 4), torch.tensor([0.1, 2.0, 1.0, 5.0], dtype=torch.float64)
    c_O = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    given = InputGram(h_I.diag(), curvature=Curvature(c_O.diag(), 1))
    found = measure(weight_OI, given, (0, 0.25, 0.5), 0)
    alone_N = ((c_O + DAMPING * c_O.mean())[:, None] * h_I * weight_OI.square()).flatten()
    for mix in found.mixes_P:
        choices = itertools.combinations(range(12), 12 - mix.nonzeros)
        best = min(float(alone_N[list(lost)].sum()) for lost in choices)
        assert mix.rank == 0
        assert mix.loss == pytest.approx(best, rel=1e-5, abs=1e-12)


def test_memory_order_changes_nothing():
    """A transposed view, as in transposed modules, has the same losses and factors."""
    specimen = of_model(14, 10)
    one, other = (
        measure(weight_OI, statistic(specimen))
        for weight_OI in (specimen.weight_OI, specimen.weight_OI.T.contiguous().T)
    )
    for mine, theirs in zip(one.mixes_P, other.mixes_P, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-9, abs=1e-9 * one.mixes_P[0].loss)


def test_gradients_of_zero_cost_nothing():
    """A linear without effect on the loss loses 0, and keeps entries by its inputs."""
    specimen = of_model(8, 6)
    flat = InputGram(specimen.gram_II, curvature=Curvature(torch.zeros(8, 8), 0))
    found = measure(specimen.weight_OI, flat)
    assert {mix.loss for mix in found.mixes_P} == {0.0}
    assert found.mixes_P[0].activation_loss > 0
    assert torch.equal(found.curvature_O, torch.ones(8))


def test_unsuitable_statistics_are_refused():
    """Curvature on the smaller side, no curvature, the outputs' Gram, NaN."""
    specimen = menagerie()["tall"]
    given = statistic(specimen)
    for curvature, said in ((None, "None"), (Curvature(torch.eye(12), 1), r"\(12, 12\)")):
        with pytest.raises(ValueError, match=said):
            METHOD.decompose(specimen.weight_OI, replace(given, curvature=curvature), 8)
    with pytest.raises(ValueError, match="not of the outputs"):
        METHOD.decompose(specimen.weight_OI, OutputGram(torch.eye(30)), 8)
    nan = replace(given, curvature=Curvature(torch.full((30, 30), torch.nan), 1))
    with pytest.raises(InputError, match="non-finite"):
        METHOD.decompose(specimen.weight_OI, nan, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"densities": "0.5"},
        {"densities": "0 0.5 0.2"},
        {"densities": "0 one"},
        {"densities": 0.5},
        {"ranks": 1.5},
    ],
)
def test_invalid_options_are_refused(options):
    """Each is named with the allowed values."""
    with pytest.raises(UsageError, match=f"{next(iter(options))} is .*; it must be"):
        make_method("two-sided-sparse", options)


def test_the_method_is_its_options():
    """Units are named by the options; label draws are part of the statistics' key."""
    named = make_method("two-sided-sparse", {"densities": "0, 0.5", "ranks": 1, "draws": 2})
    of = "damping=0.01 densities=0.0 0.5 ranks=1.0 steps=8"
    assert named.decomposition == f"two-sided-sparse {of}"
    assert named.label_draws == 2
    found = named.decompose(of_model(12, 8).weight_OI, statistic(of_model(12, 8)), 4)
    assert found.factors.keys() == {0, 48}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_read_back_unchanged(dtype, tmp_path):
    """The first of their order, by position, unrounded for any dtype of the factors."""
    specimen = of_model(14, 10)
    found = METHOD.decompose(specimen.weight_OI.float(), statistic(specimen), 5)
    stored = stored_of(found, tmp_path / "a", dtype)
    order_N = entry_order(found.weight_OI, found.curvature_O, found.square_I)
    for nonzeros in (1, 33, 140):
        values_N, positions_N = SparseLowRankKind(0).entries(stored, rank=0, nonzeros=nonzeros)
        assert positions_N.tolist() == sorted(order_N[:nonzeros].tolist())
        assert torch.equal(values_N, found.weight_OI.flatten()[positions_N])


@pytest.mark.parametrize(("nonzeros", "rank"), [(33, 0), (42, 2), (140, 0)])
def test_entries_are_fitted_to_the_residual_of_the_factors(nonzeros, rank, tmp_path):
    """They lose less with the stored factors than the weight's own; all of them give the weight."""
    specimen = of_model(14, 10)
    weight_OI, given = specimen.weight_OI.float(), statistic(specimen)
    found = measure(weight_OI, given, fits=True)
    stored = stored_of(found, tmp_path / "a", torch.float32)
    curvature_OO, losses, kept = damped(given), [], []
    for steps in (0, 4, 40):
        kind = SparseLowRankKind(steps)
        values_N, positions_N = kind.entries(stored, rank=rank, nonzeros=nonzeros)
        gap_OI = weight_OI.double()
        if rank:
            weight_OR, down_RI = found.factors[nonzeros]
            gap_OI = gap_OI - (weight_OR[:, :rank] @ down_RI[:rank]).double()
        gap_OI = gap_OI.contiguous()
        gap_OI.view(-1)[positions_N] -= values_N.double()
        losses.append(float(torch.trace(curvature_OO @ gap_OI @ specimen.gram_II @ gap_OI.T)))
        kept.append(values_N)
    if nonzeros == weight_OI.numel():
        assert torch.equal(kept[2], weight_OI.flatten())
    else:
        assert losses[2] <= losses[1] < losses[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama3") / "dense", blocks=3, hidden=32)


def compress(model, out, text, **fields):
    return run(model, out, text, method="two-sided-sparse", **fields)


@pytest.fixture(scope="module")
def half(llama, text, tmp_path_factory):
    """Result in one process and one shard; not to be changed."""
    return compress(llama, tmp_path_factory.mktemp("half") / "out", text, shards=1)


UNFITTED = {"two-sided-sparse": {"steps": 0}}


@pytest.fixture(scope="module")
def unfitted(llama, text, tmp_path_factory):
    """Result whose entries are the weight's own; not to be changed."""
    return compress(llama, tmp_path_factory.mktemp("unfitted") / "out", text, options=UNFITTED)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.85])
def test_a_checkpoint_is_factors_and_entries(keep, unfitted, llama, text, tmp_path):
    """Every linear of the loaded model is L + S computed by hand; errors are near those
    reported."""
    run_dir = str(shutil.copytree(unfitted.run_dir, tmp_path / "run"))
    fields = {"options": UNFITTED, "keep": keep, "run_dir": run_dir}
    result = compress(llama, tmp_path / "out", text, **fields)
    values = result.report["values"]
    assert 0 <= values["slack"] < 0.01 * values["dense_linears"]
    dense, loaded = AutoModelForCausalLM.from_pretrained(llama), orchestrator.load(result.out)
    units = list(result.run_dir.rglob("model.layers.*.safetensors"))
    stored = {path.name.removesuffix(".safetensors"): path for path in units}
    for name, assignment in result.plan.assignments.items():
        before_OI = dense.get_submodule(name).weight.detach()
        module = loaded.get_submodule(name)
        after_OI = module(torch.eye(before_OI.shape[1])).detach().T
        if assignment.form == "dense":
            assert torch.equal(after_OI, before_OI)
            continue
        with safe_open(stored[name], framework="pt") as file:
            part = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert torch.equal(part["dense"], before_OI)
        order_N = entry_order(before_OI, part["curvature"], part["square"])
        chosen_N = order_N[: assignment.nonzeros]
        expected_N = torch.zeros(before_OI.numel())
        expected_N[chosen_N] = before_OI.flatten()[chosen_N]
        if assignment.rank:
            weight_RO, down_RI = (
                part[f"{name}.{assignment.nonzeros}"][: assignment.rank]
                for name in ("weight", "down")
            )
            expected_N += (weight_RO.T @ down_RI).flatten()
        torch.testing.assert_close(after_OI.flatten(), expected_N, rtol=1e-4, atol=1e-6)
        error = float((after_OI - before_OI).square().sum() / before_OI.square().sum())
        entry = result.report["linears"][name]
        assert entry["weight_error"] == pytest.approx(error, rel=0.1, abs=1e-3)


@pytest.mark.parametrize(("workers", "shards"), [(1, 2), (2, 3)])
def test_cut_and_workers_change_no_bit(workers, shards, llama, text, half, tmp_path, monkeypatch):
    """For every place where gradients cross a boundary, and with workers that share no object, the
    output is byte-identical."""
    several(monkeypatch, size=workers)
    compress(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == contents(half.out)


def test_another_size_needs_no_statistics(llama, text, run_dir, tmp_path):
    """Any size is made from one run directory; its bytes are those of a direct run."""
    events = []
    for label, size in (("more", {"keep": 0.7}), ("bytes", {"keep": None, "keep_bytes": 0.4})):
        more = {**size, "run_dir": run_dir, "on_event": events.append}
        compress(llama, tmp_path / label, text, **more)
        compress(llama, tmp_path / f"{label} direct", text, **size)
        assert contents(tmp_path / label) == contents(tmp_path / f"{label} direct")
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_a_budget_in_bytes_is_met(share, llama, text, run_dir, tmp_path):
    """Including indices, at most the given bytes are stored, and almost all of them."""
    fields = {"keep": None, "keep_bytes": share, "run_dir": run_dir}
    result = compress(llama, tmp_path / "out", text, **fields)
    stored = result.report["bytes"]
    assert 0.98 * share < stored["stored"] / stored["dense_linears"] <= share


def test_refused_before_anything_is_computed(llama, text, tmp_path):
    """A budget below rank 1 everywhere, and an allocation of another method."""
    with pytest.raises(InfeasibleError, match="least possible"):
        compress(llama, tmp_path / "out", text, keep=0.01)
    with pytest.raises(UsageError, match="'cap', and two-sided-sparse measures"):
        compress(llama, tmp_path / "out", text, allocation="cap")
    with pytest.raises(UsageError, match="'two-sided-sparse', and cap measures"):
        run(llama, tmp_path / "out", text, method="cap", allocation="two-sided-sparse")


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "gemma3"])
def test_families_are_compressed(family, checkpoint, text, tmp_path):
    """The budget is met from below, and the loaded model is finite."""
    assert family in FAMILIES
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = compress(model, tmp_path / "out", text, shards=2, keep=0.6)
    assert 0.59 < result.report["kept"]["linears"] <= 0.6
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


@pytest.mark.parametrize(
    "after",
    [
        {"refine": "blocks", "options": {"refinement": {"epochs": 1}}},
        {"compensate": "anchored"},
    ],
)
def test_stages_after_the_plan_accept_its_forms(after, llama, text, run_dir, tmp_path):
    """Training and refit of the compressed model start from sparse, mixed and low-rank linears."""
    result = compress(llama, tmp_path / "out", text, keep=0.3, run_dir=run_dir, **after)
    assert len({each.form for each in result.plan.assignments.values()}) > 1
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())
