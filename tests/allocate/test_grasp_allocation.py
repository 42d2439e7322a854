"""Redundant blocks: which are cut, what they share, and refusals."""

import math

import numpy as np
import pytest
from allocation import make_curves, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.grasp import GraspAllocator, influences_of
from orchestrator.allocate.mgaa import captured
from orchestrator.errors import InfeasibleError, InputError, UsageError

LAYERS = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (160, 64), "mlp.down_proj": (64, 160)}


def model(blocks):
    """Linears, curves, and cosines of which no two are equal, of blocks in no order."""
    linears = make_model(LAYERS, blocks)
    order = np.random.default_rng(3).permutation(blocks)
    return linears, make_curves(linears), {f"{b}": 0.5 + 0.4 * order[b] / blocks for b in order}


def cut_blocks(plan, linears):
    forms = plan.assignments
    return {each.block for each in linears if forms[each.name].form != "dense"}


def test_the_published_size_cuts_the_published_blocks():
    """At 0.825 of 32 blocks the 8 of least influence keep 0.3 of their values, at most one rank a
    linear less than floor(0.3 m n / (m + n)) or more, and the others stay dense."""
    linears, curves, cosines = model(32)
    plan = GraspAllocator()(linears, curves, Budget(0.825), cosines)
    assert cut_blocks(plan, linears) == {*sorted(range(32), key=lambda b: -cosines[f"{b}"])[:8]}
    for linear in linears:
        if plan.assignments[linear.name].form != "dense":
            published = int(0.3 * linear.values / linear.rank_cost)
            assert plan.assignments[linear.name].rank - published in (0, 1)
    assert plan.slack_values < max(each.rank_cost for each in linears)


@given(percent=st.integers(4, 99), least=st.sampled_from([0.1, 0.3, 0.6]))
@settings(deadline=None, max_examples=40)
def test_no_fewer_blocks_would_do(percent, least):
    """The blocks share at least the asked fraction, one block less would not, and they are those
    of least influence; below that fraction all are cut."""
    linears, curves, cosines = model(12)
    keep = percent / 100
    plan = GraspAllocator(least=least)(linears, curves, Budget(keep), cosines)
    found = cut_blocks(plan, linears)
    order = sorted(range(12), key=lambda b: -cosines[f"{b}"])
    assert found == {*order[: len(found)]}
    shared = [1 - 12 * (1 - keep) / count for count in (len(found), max(len(found) - 1, 1))]
    assert len(found) == 12 or shared[0] >= least - 1e-3
    assert len(found) == 1 or shared[1] < least + 1e-3


def test_a_share_of_the_importance_is_the_fewest_directions():
    """The rank of every redundant linear is the smallest that captures τ, one τ for all; only the
    budget ends it before."""
    linears, curves, cosines = model(4)
    plan = GraspAllocator(blocks=2, cut="importance")(linears, curves, Budget(0.7), cosines)
    before, after = [], []
    for linear in linears:
        if (rank := plan.assignments[linear.name].rank) > 0:
            fraction_K = captured(linear, curves[linear.name])
            before.append(fraction_K[rank - 1])
            after.append(fraction_K[rank])
    assert len(before) == 6
    assert max(before) <= min(after) + 1e-12


@pytest.mark.parametrize("cut", ["values", "importance"])
def test_with_a_number_of_blocks_no_rank_falls_as_the_budget_grows(cut):
    """The same blocks are cut at every budget."""
    linears, curves, cosines = model(4)
    before = 0
    for percent in range(53, 100):
        allocator = GraspAllocator(blocks=2, cut=cut)
        plan = allocator(linears, curves, Budget(percent / 100), cosines)
        sizes = np.array([plan.assignments[each.name].stored_values(each) for each in linears])
        assert np.all(sizes >= before)
        before = sizes


def test_exchanged_cosines_exchange_blocks():
    """Blocks with equal curves get the assignments of the block whose cosine they get."""
    linears, _, cosines = model(6)
    curves = {
        each.name: make_curves(make_model(LAYERS, 1))[f"blocks.0.{each.role}"] for each in linears
    }
    turned = cosines | {"0": cosines["4"], "4": cosines["0"]}
    one, two = (GraspAllocator()(linears, curves, Budget(0.8), each) for each in (cosines, turned))
    other = {"0": "4", "4": "0"}
    for linear in linears:
        name = f"blocks.{other.get(f'{linear.block}', linear.block)}.{linear.role}"
        assert two.assignments[name] == one.assignments[linear.name]


def test_more_blocks_than_there_are_is_refused():
    """The message has both numbers; before calibration too."""
    linears, curves, cosines = model(4)
    allocator = GraspAllocator(blocks=5)
    for refused in (
        lambda: allocator(linears, curves, Budget(0.8), cosines),
        lambda: allocator.check_budget(linears, Budget(0.8)),
    ):
        with pytest.raises(UsageError, match=r"blocks is 5, .* in 4 blocks"):
            refused()


def test_dense_blocks_that_leave_too_little_are_infeasible():
    """One block of four leaves nothing at 0.7, and less than rank 1 at 0.751; the message says
    what helps, before calibration too."""
    linears, curves, cosines = model(4)
    allocator = GraspAllocator(blocks=1)
    for keep in (0.7, 0.751):
        for refused in (
            lambda keep=keep: allocator(linears, curves, Budget(keep), cosines),
            lambda keep=keep: allocator.check_budget(linears, Budget(keep)),
        ):
            with pytest.raises(InfeasibleError, match=r"1 blocks are cut.*raise grasp\.blocks"):
                refused()
    assert cut_blocks(allocator(linears, curves, Budget(0.8), cosines), linears) == {
        max(range(4), key=lambda block: cosines[f"{block}"])
    }


@pytest.mark.parametrize("cosine", [math.nan, None])
def test_a_block_without_a_cosine_is_refused(cosine):
    """NaN, or none at all as in runs of earlier versions: the message names the block."""
    linears, curves, cosines = model(4)
    broken = {name: each for name, each in cosines.items() if name != "2"}
    broken |= {} if cosine is None else {"2": cosine}
    with pytest.raises(InputError, match="block 2: the cosine of its input and output is"):
        GraspAllocator()(linears, curves, Budget(0.8), broken)
    assert [*influences_of(linears, cosines)] == [0, 1, 2, 3]
