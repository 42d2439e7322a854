"""Course of polarised gates: weights by step, and the budgets with gains of their own."""

import numpy as np
import pytest

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.soco import (
    HEIGHT,
    WITHIN,
    Soco,
    polarisation_at,
    pull_at,
)
from orchestrator.errors import UsageError
from orchestrator.plan.linear import Linear


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
        ({"budgets": "0.6 0.4"}, "must be ascending numbers"),
        ({"budgets": "half"}, "must be ascending numbers"),
        ({"budgets": "0.5 1.5"}, "soco: budgets is 1.5"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    """Each in one line."""
    with pytest.raises(UsageError, match=message):
        make_allocator("soco", options)


@pytest.mark.parametrize(
    ("options", "sizes", "taken"),
    [
        ({"target": 0.6}, (0.5, 0.6, 0.61), [0.6, 0.6, None]),
        ({"budgets": 0.5}, (0.4, 0.5, 0.6), [0.5, 0.5, None]),
        (
            {"budgets": "0.4 0.6, 0.8"},
            (0.3, 0.4, 0.41, 0.6, 0.75, 0.9),
            [0.4, 0.4, 0.6, 0.6, 0.8, None],
        ),
    ],
)
def test_a_size_takes_the_gains_of_the_nearest_budget_at_or_above_it(options, sizes, taken):
    """All that it keeps is kept there; above the largest one gates that are kept may be near 0,
    which is no gain."""
    soco = make_allocator("soco", options)
    assert [soco.gain_budget(kept) for kept in sizes] == taken


def test_the_smallest_budget_is_the_target():
    """It decides the scores alone: other budgets find them. Each has the steps of the third phase,
    without terms, and costs as many passes."""
    alone, several = Soco(target=0.4, steps=100), Soco(budgets="0.4 0.6", steps=100)
    assert several.decisive() == alone.decisive() != Soco(steps=100).decisive()
    gains = several.of_gains()
    assert (gains.steps, gains.weights_at(25, 0.9)) == (25, (0, 0))
    assert several.scoring_passes(7) == 1.5 * alone.scoring_passes(7)
    linears = [
        Linear(
            name="a", block=0, role="a", site="a", out_features=20, in_features=20, has_bias=False
        )
    ]
    several.check_budget(linears, Budget(0.4))
    with pytest.raises(UsageError, match=r"0\.3 is below 0\.4, the size that soco\.budgets learns"):
        several.check_budget(linears, Budget(0.3))
