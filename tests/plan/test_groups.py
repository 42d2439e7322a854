"""Groups of linears that share a basis: as one tall linear, and back."""

import numpy as np
import torch
from allocation import RANK_ALLOCATORS, make_curves, make_model

from orchestrator.allocate.budget import Budget
from orchestrator.linalg.low_rank import InputGram, decompose, summed
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.grouping import Grouping, stack

SHAPES = {"attn.q_proj": (24, 16), "attn.o_proj": (16, 24), "mlp.up_proj": (40, 16)}
GROUPING = Grouping(2, ("q_proj", "up_proj"))
HIDDEN, INNER, EXPERTS = 16, 6, 4
OF_EXPERTS = {
    "attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate": (8, HIDDEN),
    **{
        f"mlp.experts.{e}.{part}": (HIDDEN, INNER) if part == "down" else (INNER, HIDDEN)
        for e in range(EXPERTS)
        for part in ("gate", "up", "down")
    },
}
SHARING = Grouping(experts=(("gate", "up"), ("down",)))


def test_only_the_named_kinds_are_grouped_and_the_last_group_may_be_short():
    """Blocks 0-1 and 2-3 share, block 4 stands alone, and o_proj is never grouped."""
    linears = make_model(SHAPES, blocks=5)
    sizes = {group[0].name: [each.block for each in group] for group in GROUPING.groups(linears)}
    assert sizes["blocks.0.attn.q_proj"] == [0, 1]
    assert sizes["blocks.2.mlp.up_proj"] == [2, 3]
    assert sizes["blocks.4.attn.q_proj"] == [4]
    assert all(blocks == [int(n.split(".")[1])] for n, blocks in sizes.items() if "o_proj" in n)
    assert sum(map(len, sizes.values())) == len(linears)


def test_linears_of_other_shapes_stay_alone():
    """A group never stacks weights that read inputs of different sizes."""
    linears = make_model({"q_proj": (8, 8)}, 1) + make_model({"q_proj": (8, 12)}, 2)[1:]
    assert [len(group) for group in GROUPING.groups(linears)] == [1, 1]


def test_a_rank_of_a_group_stores_one_basis_and_all_left_factors():
    """n matrices m by k: n m + k values a rank, and break-even at n m k / (n m + k)."""
    first, second = make_model({"q_proj": (24, 16)}, 2)
    tall = stack([first, second])
    assert (tall.name, tall.out_features, tall.rank_cost) == (first.name, 48, 64)
    assert LOW_RANK.break_even(tall) == 48 * 16 // 64


def test_experts_of_a_block_have_a_basis_of_inputs_and_one_of_outputs():
    """Gates and ups stand on top of each other, downs side by side; a dense `mlp.gate` is alone."""
    linears = make_model(OF_EXPERTS, blocks=2)
    groups = {group[0].name: group for group in SHARING.groups(linears)}
    first, second = "blocks.0.mlp.experts.0.gate", "blocks.0.mlp.experts.0.down"
    assert {each.part for each in groups[first]} == {"gate", "up"}
    assert len(groups[first]) == 2 * EXPERTS
    assert len(groups[second]) == EXPERTS
    assert {each.block for each in groups[first]} == {0}
    assert len(groups["blocks.1.mlp.gate"]) == 1
    tall, wide = stack(groups[first]), stack(groups[second])
    assert (tall.out_features, tall.in_features) == (2 * EXPERTS * INNER, HIDDEN)
    assert (wide.out_features, wide.in_features) == (HIDDEN, EXPERTS * INNER)
    # of two factors of its own an expert saves values below 16 * 6 // 22 = 4 only
    assert LOW_RANK.break_even(tall) == 12
    assert LOW_RANK.break_even(wide) == 9


def test_a_single_expert_has_factors_of_its_own():
    """One targeted down is plain low rank; no basis is named."""
    linears = make_model({"mlp.experts.3.down": (HIDDEN, 2 * INNER)}, blocks=1)
    plan = RANK_ALLOCATORS["uniform"]()(linears, make_curves(linears), Budget(0.7), {})
    (assignment,) = SHARING.spread(linears, plan).assignments.values()
    assert (assignment.form, assignment.basis) == ("low_rank", "")


def test_a_plan_for_experts_stores_the_same_spread_over_them():
    """Every allocator's plan keeps its total; downs that are cut have an output basis, each basis
    is stored once, with the group's first linear."""
    linears = make_model(OF_EXPERTS, blocks=3)
    joint = SHARING.stacked(linears)
    parts = {name for each in linears for name in (each.sublayer, f"{each.block}")}
    cosines = dict.fromkeys(parts, 0.8)
    for name, allocator in RANK_ALLOCATORS.items():
        plan = allocator()(joint, make_curves(joint), Budget(0.7), cosines)
        spread = SHARING.spread(linears, plan)
        stored = sum(spread.assignments[each.name].stored_values(each) for each in linears)
        assert stored == plan.stored_values, name
        for group in SHARING.groups(linears):
            assigned = [spread.assignments[each.name] for each in group]
            is_cut = assigned[0].form != "dense"
            is_shared = len(group) > 1 and group[0].part == "down"
            form = ("output_basis" if is_shared else "low_rank") if is_cut else "dense"
            assert {each.form for each in assigned} == {form}, name
            others = {each.basis for each in assigned[1:]}
            assert others <= ({group[0].name} if is_cut else {""})
            assert assigned[0].basis == ""


def test_a_plan_for_groups_stores_the_same_spread_over_their_linears():
    """Every allocator's plan keeps its total when each linear gets its own part of the group."""
    linears = make_model(SHAPES, blocks=5)
    tall = GROUPING.stacked(linears)
    curves = make_curves(tall)
    parts = {name for each in linears for name in (each.sublayer, f"{each.block}")}
    cosines = dict.fromkeys(parts, 0.8)
    for name, allocator in RANK_ALLOCATORS.items():
        plan = allocator()(tall, curves, Budget(0.7), cosines)
        spread = GROUPING.spread(linears, plan)
        assert list(spread.assignments) == [each.name for each in linears], name
        stored = sum(spread.assignments[each.name].stored_values(each) for each in linears)
        assert stored == plan.stored_values == spread.stored_values, name
        for first, *others in GROUPING.groups(linears):
            of_first = spread.assignments[first.name]
            assert of_first.basis == ""
            for other in others:
                assignment = spread.assignments[other.name]
                assert (assignment.form, assignment.rank) == (of_first.form, of_first.rank)
                assert assignment.basis == (first.name if of_first.form != "dense" else "")


def test_the_shared_basis_is_the_best_one_for_the_summed_moment():
    """Cut energies of the stacked decomposition are what its members lose on all inputs."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(24, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
    inputs = [torch.randn(100, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
    grams = [InputGram(rows_TI.T @ rows_TI, len(rows_TI)) for rows_TI in inputs]
    statistic = summed(grams)
    assert statistic.tokens == 200
    rank = 7
    result = decompose(torch.cat(weights), statistic, rank, precision="exact")
    lost = 0.0
    for index, weight_OI in enumerate(weights):
        rows_OR = result.weight_OR[24 * index : 24 * (index + 1)]
        gap_OI = weight_OI - rows_OR @ result.down_RI
        lost += float(torch.trace(gap_OI @ statistic.matrix_II @ gap_OI.T))
    predicted = result.total - float(result.energies_K[:rank].sum())
    np.testing.assert_allclose(lost, predicted, rtol=1e-9)
