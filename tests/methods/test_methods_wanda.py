"""Wanda against brute force, and the order of its stored entries."""

import itertools

import pytest
import torch
from matrices import gaussian, menagerie, of_model

from orchestrator.allocate import ALLOCATORS, make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.linalg.low_rank import InputGram, OutputGram
from orchestrator.linalg.sparsity.sparse import PARTS, part_edges
from orchestrator.methods import METHODS
from orchestrator.plan.forms import SPARSE
from orchestrator.plan.linear import Linear

WANDA = METHODS["wanda"]


def wanda(specimen):
    gram_II = specimen.inputs_TI.T @ specimen.inputs_TI
    return WANDA.decompose(specimen.weight_OI, InputGram(gram_II), 1)


def kept(found, nonzeros):
    """Weight made of the first entries."""
    flat = torch.zeros(found.shape[0] * found.shape[1])
    flat[found.positions_N[:nonzeros].long()] = found.values_N[:nonzeros]
    return flat.view(found.shape)


def linear(name, outputs, inputs):
    return Linear(
        name=name,
        block=0,
        role=name,
        site=name,
        out_features=outputs,
        in_features=inputs,
        has_bias=False,
    )


def test_a_row_keeps_the_entries_of_a_brute_force_search():
    """Among all choices of k entries per row, the kept one has the largest sum of |W_ij| |x_j|."""
    weight_OI, inputs_TI = gaussian(3, 6), gaussian(20, 6, seed=1)
    found = WANDA.decompose(weight_OI, InputGram(inputs_TI.T @ inputs_TI), 1)
    score_OI = weight_OI.abs() * inputs_TI.norm(dim=0)
    for count in range(1, 6):
        mask_OI = kept(found, 3 * count) != 0
        for row in range(3):
            best = max(
                itertools.combinations(range(6), count),
                key=lambda columns, row=row: float(score_OI[row, list(columns)].sum()),
            )
            assert tuple(mask_OI[row].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("name", menagerie())
def test_every_prefix_has_equally_many_entries_of_each_row(name):
    """Equal up to one entry; no entry occurs twice or changes, and all of them give the weight."""
    specimen = menagerie()[name]
    found = wanda(specimen)
    outputs, inputs = found.shape
    assert found.positions_N.dtype == torch.int32
    assert sorted(found.positions_N.tolist()) == list(range(outputs * inputs))
    assert torch.equal(kept(found, outputs * inputs), specimen.weight_OI.float())
    counts_O = torch.zeros(outputs, dtype=torch.int64)
    for position in found.positions_N.tolist():
        counts_O[position // inputs] += 1
        assert counts_O.max() - counts_O.min() <= 1


@pytest.mark.parametrize("name", menagerie())
def test_losses_are_those_of_the_removed_entries(name):
    """At every edge: in the inputs' norm, of the weight, and of the squared scores."""
    specimen = menagerie()[name]
    weight_OI, inputs_TI = specimen.weight_OI, specimen.inputs_TI
    found = wanda(specimen)
    score_OI = weight_OI.abs() * inputs_TI.norm(dim=0)
    assert found.total == pytest.approx(float(score_OI.square().sum()))
    energy = float((inputs_TI @ weight_OI.T).square().sum())
    edges = part_edges(weight_OI.numel())
    assert len(edges) == len(found.activation_losses) == len(found.weight_losses) == PARTS + 1
    assert found.activation_losses[-1] == found.weight_losses[-1] == 0
    for part, nonzeros in enumerate(edges):
        lost_OI = torch.where(kept(found, nonzeros) != 0, 0, weight_OI)
        of_outputs = float((inputs_TI @ lost_OI.T).square().sum())
        assert found.activation_losses[part] == pytest.approx(of_outputs, abs=1e-12 * energy)
        assert found.weight_losses[part] == pytest.approx(float(lost_OI.square().sum()))
        of_scores = float(torch.where(lost_OI != 0, score_OI, 0).square().sum())
        left = found.total - float(found.energies_P[:part].sum())
        assert left == pytest.approx(of_scores, abs=1e-12 * found.total)


def test_equal_scores_are_ordered_by_column():
    """The order is deterministic: of equal entries the first column comes first."""
    found = WANDA.decompose(torch.ones(2, 3), InputGram(torch.eye(3)), 1)
    assert found.positions_N.tolist() == [0, 3, 1, 4, 2, 5]


def test_dead_inputs_are_pruned_first():
    """A column that no token reaches has score 0, however large its weights."""
    weight_OI = torch.tensor([[1.0, 100.0], [2.0, 100.0]])
    found = WANDA.decompose(weight_OI, InputGram(torch.diag(torch.tensor([1.0, 0.0]))), 1)
    assert kept(found, 2).tolist() == [[1, 0], [2, 0]]


def test_an_invalid_gram_of_inputs_is_refused():
    """Scores need the inputs' norms, from a finite Gram without negative diagonal."""
    weight_OI = gaussian(3, 2)
    with pytest.raises(ValueError, match="outputs"):
        WANDA.decompose(weight_OI, OutputGram(torch.eye(3)), 1)
    with pytest.raises(InputError, match="1 of 2 diagonal"):
        WANDA.decompose(weight_OI, InputGram(torch.diag(torch.tensor([1.0, -1.0]))), 1)
    with pytest.raises(InputError, match="non-finite"):
        WANDA.decompose(weight_OI * torch.nan, InputGram(torch.eye(2)), 1)
    with pytest.raises(ValueError, match="needs its own"):
        WANDA.decompose(weight_OI, InputGram(torch.eye(3)[:2]), 1)


def test_a_bfloat16_weight_is_sorted_as_its_float32_copy():
    """The same order and the same losses, bit for bit."""
    specimen = of_model(24, 16)
    half = specimen.weight_OI.bfloat16()
    gram = InputGram(specimen.inputs_TI.T @ specimen.inputs_TI)
    one, other = (WANDA.decompose(weight, gram, 1) for weight in (half, half.float()))
    assert torch.equal(one.positions_N, other.positions_N)
    assert torch.equal(one.values_N, other.values_N)
    assert one.activation_losses == other.activation_losses


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.5, 0.77, 0.999])
def test_uniform_entries_meet_the_budget_from_below(keep):
    """floor(keep m n) entries each; less than one value per linear remains."""
    linears = [linear("a", 40, 30), linear("b", 33, 70), linear("c", 2000, 1)]
    plan = make_allocator("uniform", {}, "sparse")(linears, {}, Budget(keep, SPARSE), {})
    assert 0 <= plan.slack_values < len(linears)
    for each in linears:
        assignment = plan.assignments[each.name]
        assert assignment.form == "sparse"
        assert assignment.nonzeros == assignment.stored_values(each) == int(keep * each.values)


def test_all_entries_are_the_dense_weight():
    """At 1 no linear is sparse; below one entry the budget is infeasible."""
    linears = [linear("a", 40, 30), linear("b", 3, 3)]
    uniform = make_allocator("uniform", {}, "sparse")
    plan = uniform(linears, {}, Budget(1.0, SPARSE), {})
    assert {each.form for each in plan.assignments.values()} == {"dense"}
    with pytest.raises(InfeasibleError, match=r"b: 0\.1 of a 3 x 3 weight is below one"):
        uniform(linears, {}, Budget(0.1, SPARSE), {})
    with pytest.raises(InfeasibleError, match="one entry for each of 2 linears stores 2"):
        uniform(linears, {}, Budget(0.001, SPARSE), {})


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"uniform"}))
def test_other_allocations_are_refused_for_a_sparse_form(name):
    """One clear message that lists the possible allocations."""
    with pytest.raises(
        UsageError, match=rf"'{name}' divides (ranks|experts|clusters).*one of uniform"
    ):
        make_allocator(name, {}, "sparse")
