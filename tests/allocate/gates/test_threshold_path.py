"""The path of thresholds: plans by the curves alone, curves in nats, and its options."""

import numpy as np
import pytest
from allocation import make_cosines, make_curves, make_model

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.threshold_path import ThresholdPath, path_curve
from orchestrator.allocate.steps import step_costs
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.forms import LOW_RANK, PIVOTED

MODEL = make_model({"q_proj": (48, 48), "k_proj": (16, 48), "down_proj": (48, 96)}, blocks=2)
TOKENS = 1000


def stored(curve, form, threshold, linear):
    """Values of a linear whose steps worth more than a threshold are kept."""
    kept = int((path_curve(linear, curve, form, TOKENS).worth_S > threshold).sum())
    return int(step_costs(linear, AllowedRanks(form))[:kept].sum())


@pytest.mark.parametrize("form", [LOW_RANK, PIVOTED], ids=["plain", "pivoted"])
def test_without_corrections_a_step_keeps_the_plan_of_threshold(form):
    """At every step of the path each linear stores what `threshold` gives it at a budget of just
    that many values, and these are no more than 1 - step · t of the dense ones."""
    curves, path = make_curves(MODEL, seed=3), ThresholdPath(step=0.05)
    followed = path.begin(MODEL, curves, form, TOKENS)
    dense = sum(each.values for each in MODEL)
    for step in range(1, path.expected_steps + 1):
        threshold, _ = followed.weights_at(step, 1.0)
        sizes = {e.name: stored(curves[e.name], form, threshold, e) for e in MODEL}
        kept = sum(sizes.values()) / dense
        assert kept <= 1 - 0.05 * step + 1e-12
        budget = Budget(kept + 1e-9, form)
        plan = Threshold()(MODEL, curves, budget, make_cosines(MODEL))
        assert {e.name: plan.assignments[e.name].stored_values(e) for e in MODEL} == sizes
    assert followed.thresholds == tuple(sorted(followed.thresholds))


def test_curves_are_in_nats_a_token():
    """The energies of the method are twice the nats over all tokens; worths are the slopes of the
    lower convex hull of the loss, so that their sum by cost is the loss but for the first step's,
    which is always kept."""
    curves = make_curves(MODEL, seed=3)
    for linear in MODEL:
        curve, found = (
            curves[linear.name],
            path_curve(linear, curves[linear.name], LOW_RANK, TOKENS),
        )
        count = len(found.energy_K)
        np.testing.assert_allclose(found.energy_K, curve.energies[:count] / 2 / TOKENS)
        np.testing.assert_allclose(found.loss_S[0], curve.total / 2 / TOKENS)
        np.testing.assert_allclose(
            found.loss_S[1:], [curve.loss(rank) / 2 / TOKENS for rank in range(1, count + 1)]
        )
        assert np.isinf(found.worth_S[0])
        assert (np.diff(found.worth_S[1:]) <= 0).all()
        costs = step_costs(linear)
        sums = (found.worth_S[1:] * costs[1:]).sum()
        np.testing.assert_allclose(sums, found.loss_S[1], rtol=0.02)


def test_steps_end_below_stop():
    """Corrected curves may close less than the curves alone, so steps go on to half of `stop`."""
    path = ThresholdPath(stop=0.4, step=0.01)
    assert path.expected_steps == 60
    assert path.steps == 80
    assert path.ends_at(0.4)
    assert not path.ends_at(0.401)
    assert path.scoring_passes(100) == 3 * 60 * 4
    with pytest.raises(TypeError, match="begin"):
        path.weights_at(1, 1.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("stop", 0), ("step", 2), ("gains", "some"), ("prior", 0), ("rate", 2), ("memory", 1)],
)
def test_options_out_of_range(option, value):
    with pytest.raises(UsageError, match=f"path: {option}"):
        make_allocator("path", {option: value})
