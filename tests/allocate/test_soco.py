"""Course of polarised gates: weights by step, budgets from the seed, thresholds within a budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.allocate import make_allocator
from orchestrator.allocate.soco import (
    HEIGHT,
    WITHIN,
    Soco,
    drawn_budget,
    polarisation_at,
    pull_at,
    threshold_at,
)
from orchestrator.errors import UsageError
from orchestrator.randomness import Randomness


@pytest.mark.parametrize("steps", [4, 100, 1000])
def test_weights_are_0_then_oscillate_then_rise(steps):
    """Half of the steps have none, a quarter at most a tenth of the last weight, and the others
    rise to it; the last step has all of it."""
    found = np.array([polarisation_at(step, steps, 3.0) for step in range(1, steps + 1)])
    half, three = steps // 2, 3 * steps // 4
    assert (found[:half] == 0).all()
    assert (found[half:three] >= 0).all()
    assert found[half:three].max() <= HEIGHT * 3.0
    assert (np.diff(found[three - 1 :]) > 0).all()
    assert found[-1] == 3.0
    if steps >= 100:
        turns = np.diff(np.sign(np.diff(found[half:three]))) != 0
        assert turns.sum() >= 7


def test_a_pull_is_the_slope_of_the_distance():
    """The weight outside of the rounded kink, with the sign of the distance; linear within."""
    assert pull_at(0.7, 0.6, 2.0) == 2.0
    assert pull_at(0.5, 0.6, 2.0) == -2.0
    assert pull_at(0.6, 0.6, 2.0) == 0
    assert pull_at(0.6 + WITHIN / 4, 0.6, 2.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": 0}, "one must be above 0"),
        ({"target": 0}, "soco: target"),
        ({"below_target": "maybe"}, "allow, refuse|refuse, allow"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    """Each in one line."""
    with pytest.raises(UsageError, match=message):
        make_allocator("soco", options)


def test_gains_are_for_the_target_and_below():
    """Gates that are kept above the target may be near 0, which is no gain."""
    assert [Soco(target=0.6).has_gains(kept) for kept in (0.5, 0.6, 0.61)] == [True, True, False]


def test_budgets_follow_from_the_seed_and_the_step():
    """Every budget is drawn about equally often; another seed draws others, the same seed the
    same, in any order of steps."""
    budgets = (0.4, 0.6, 0.8)
    drawn = [drawn_budget(budgets, Randomness(0).budget(step)) for step in range(1, 601)]
    assert all(150 < drawn.count(each) < 250 for each in budgets)
    assert drawn[99:89:-1] == [
        drawn_budget(budgets, Randomness(0).budget(step)) for step in range(100, 90, -1)
    ]
    assert drawn != [drawn_budget(budgets, Randomness(1).budget(step)) for step in range(1, 601)]
    assert {drawn_budget((0.5,), Randomness(0).budget(step)) for step in range(9)} == {0.5}


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.5]), st.integers(1, 9)), min_size=1),
    st.integers(0, 60),
)
def test_a_threshold_keeps_the_largest_gates_that_fit(gates, values):
    """Gates above it fit, and with those at the threshold they would not."""
    gates_N, costs_N = (np.array(each) for each in zip(*gates, strict=True))
    found = threshold_at(gates_N, costs_N, values)
    assert costs_N[gates_N > found].sum() <= values
    if found > -np.inf:
        assert costs_N[gates_N >= found].sum() > values
    else:
        assert costs_N.sum() <= values
