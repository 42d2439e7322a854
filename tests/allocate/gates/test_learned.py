"""The allocation by learned scores: nested sizes, the tail, and sizes that were not learned."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from allocation import make_cosines, make_curves, make_linears, make_model

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.learned import Learned
from orchestrator.allocate.gates.scores import extrapolates
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks

MODEL = make_model({"q_proj": (48, 48), "k_proj": (16, 48), "down_proj": (48, 96)}, blocks=2)
DENSE = sum(each.values for each in MODEL)


def plan(linears, curves, keep, **options):
    return Learned(**options)(linears, curves, Budget(keep), make_cosines(linears))


def one_linear(scores, energies=None):
    """A linear [8, 8], break-even 4, whose three directions and tail have these scores."""
    (linear,) = make_linears([(8, 8)])
    curve = make_curves([linear])[linear.name]
    energies = curve.energies if energies is None else np.array(energies)
    return linear, {linear.name: replace(curve, energies=energies, scores=np.array(scores))}


def test_a_size_is_a_prefix_of_one_order():
    """Over all budgets: directions leave in ascending order of scores over the whole model, and
    what a smaller budget keeps is part of what a larger one keeps."""
    curves = make_curves(MODEL, seed=3)
    sizes = range(DENSE // 3, DENSE + 1, 371)
    plans = [plan(MODEL, curves, size / DENSE, below_stop="allow") for size in sizes]
    for found in plans:
        cut = {n: a.rank for n, a in found.assignments.items() if a.form != "dense"}
        # directions that closed before the tail stay as long as it does
        order = {n: np.maximum(curves[n].scores, curves[n].scores[-1]) for n in cut}
        left = [order[name][rank] for name, rank in cut.items()]
        stays = [order[name][rank - 1] for name, rank in cut.items() if rank > 1]
        assert max(left, default=-1e9) <= min(stays, default=1e9)
    for smaller, larger in itertools.pairwise(plans):
        for name, before in smaller.assignments.items():
            after = larger.assignments[name]
            assert after.form == "dense" or (before.form != "dense" and before.rank <= after.rank)


def test_directions_that_close_before_the_tail_leave_with_it():
    """Until the tail closes the weight is stored whole, so their own steps are those of the tail:
    one score for all of them, and rank 2 is the first size below dense that has another."""
    linear, curves = one_linear([0.5, -20.0, -40.0, -30.0])
    ranks = [
        plan([linear], curves, keep, below_stop="allow").assignments[linear.name].rank
        for keep in (0.99, 0.75, 0.5, 0.25)
    ]
    assert ranks == [3, 3, 2, 1]
    assert not extrapolates([linear], curves, plan([linear], curves, 0.3), AllowedRanks())
    linear, curves = one_linear([0.5, 0.4, -40.0, 0.1])
    with pytest.raises(InfeasibleError, match=r"the smallest learned size is 1\.0"):
        plan([linear], curves, 0.9)


def test_ties_are_in_the_order_of_energy_per_value():
    """If directions of two linears closed in one step, the linear with more energy keeps more."""
    linears = make_linears([(8, 8), (8, 8)])
    curves = make_curves(linears)
    for each, scale in zip(linears, (1.0, 100.0), strict=True):
        energies = scale * np.array([3.0, 2.0, 1.0, 0.5])
        scores = np.array([1.0, -5.0, -5.0, -9.0])
        curves[each.name] = replace(
            curves[each.name], energies=energies, total=float(energies.sum()), scores=scores
        )
    found = plan(linears, curves, 0.5, stop=0.3).assignments
    assert [found[each.name].rank for each in linears] == [1, 3]


def test_sizes_below_the_open_gates_are_refused_or_extrapolated():
    """The least learned size is that of the open gates, to six digits; below it one line says so,
    or the plan is made by the scores of open gates and is known as extrapolated."""
    curves = make_curves(MODEL, seed=4)
    ranks = {each.name: max(int((curves[each.name].scores > 0).sum()), 1) for each in MODEL}
    least = sum(ranks[each.name] * each.rank_cost for each in MODEL)
    found = plan(MODEL, curves, least / DENSE, stop=0.01)
    assert {name: each.rank for name, each in found.assignments.items()} == ranks
    with pytest.raises(InfeasibleError, match=f"smallest learned size is {least / DENSE:.6f}"):
        plan(MODEL, curves, (least - 1) / DENSE, stop=0.01)
    below = plan(MODEL, curves, (least - 1) / DENSE, below_stop="allow")
    assert extrapolates(MODEL, curves, below, AllowedRanks())
    assert not extrapolates(MODEL, curves, found, AllowedRanks())
    with pytest.raises(UsageError, match=r"0\.3 is below 0\.4, where learned\.stop ends"):
        Learned().check_budget(MODEL, Budget(0.3))


def test_adapters_and_one_direction_of_each_linear_are_always_kept():
    """They come before all other directions of the model; a budget that does not hold them has no
    plan, even where open gates may be closed."""
    linears = make_linears([(16, 16), (16, 16)])
    curves = make_curves(linears)
    for each, best in zip(linears, (0.9, -50.0), strict=True):
        scores = np.array([np.inf] * 3 + [best - n for n in range(4)] + [best - 9])
        curves[each.name] = replace(curves[each.name], scores=scores)
    options = {"adapters": 2, "below_stop": "allow"}
    found = plan(linears, curves, 8 * 32 / 512, **options).assignments
    assert [found[each.name].rank for each in linears] == [5, 3]
    with pytest.raises(InfeasibleError, match="holds rank 2 of a linear"):
        plan(linears, curves, 5 * 32 / 512, **options)
    with pytest.raises(UsageError, match=r"adapters is 7, and .* has 7 ranks below break-even"):
        Learned(adapters=7).check_budget(linears, Budget(0.6))


def test_the_pull_follows_from_the_step_alone():
    """1.01 to the power of the fourth part of the step: 12 times after 1,000, 145 after 2,000."""

    def pull(step):
        return Learned().weights_at(step, 1.0)[0]

    assert [pull(step) / 2e-5 for step in (1, 4, 5)] == pytest.approx([1, 1, 1.01])
    assert [round(pull(1000 * n + 1) / 2e-5) for n in (1, 2, 3, 4)] == [12, 145, 1742, 20959]
    assert Learned().expected_steps == 3000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_entropy": 0}, "cross_entropy is 0"),
        ({"stop": 0}, "learned: stop"),
        ({"penalty_by": "values"}, "cost, count"),
        ({"below_stop": "maybe"}, "allow, refuse|refuse, allow"),
        ({"stpo": 0.3}, "stop"),
    ],
)
def test_options_that_are_not_allowed_are_refused(options, message):
    """In one line with what is allowed."""
    with pytest.raises(UsageError, match=message):
        make_allocator("learned", options)


def test_curves_without_scores_are_refused():
    """Scores are made by the stage of this allocation alone."""
    curves = {n: replace(c, scores=None) for n, c in make_curves(MODEL).items()}
    with pytest.raises(InputError, match="0 of 23 directions have learned scores"):
        plan(MODEL, curves, 0.6)
