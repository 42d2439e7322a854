"""Choice of points by Optuna: a function of its arguments, and better than chance."""

import math
from importlib.util import find_spec

import pytest

from orchestrator.errors import UsageError
from orchestrator.stages.score_plans import sampler
from orchestrator.stages.score_plans.sampler import ask

BOUNDS = ((-1.0, 1.0),) * 4
BEST = (0.6, -0.4, 0.2, -0.7)


def separable(point):
    """Sum of a function of each coordinate, least at `BEST`."""
    return sum((x - best) ** 2 for x, best in zip(point, BEST, strict=True))


def course(name, seed, rounds):
    """Points in rounds of four, after one in the middle of the box."""
    told = [((0.0,) * 4, separable((0.0,) * 4))]
    for number in range(rounds):
        asked = ask(told, BOUNDS, 4, sampler=name, seed=seed + number)
        told += [(point, separable(point)) for point in asked]
    return told


@pytest.mark.parametrize(("name", "rounds"), [("gp", 3), ("tpe", 8)])
def test_a_sampler_finds_better_points_than_the_first(name, rounds):
    """On a separable function, from its second round on, and better ones than random points."""
    told, random = course(name, 0, rounds), course("random", 0, rounds)
    best, by_chance = (min(value for _, value in each) for each in (told, random))
    assert best < told[0][1]
    assert best < by_chance


@pytest.mark.parametrize("name", ["gp", "tpe", "random"])
def test_points_follow_from_the_arguments_alone(name):
    """Equal arguments give equal points in the box, all different; another seed gives others."""
    told = course("random", 3, 2)
    one, two = (ask(told, BOUNDS, 2, sampler=name, seed=5) for _ in range(2))
    assert one == two
    assert len({*one}) == 2
    assert all(-1 <= x <= 1 for point in one for x in point)
    assert ask(told, BOUNDS, 2, sampler=name, seed=6) != one


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    """One line, before anything is computed."""
    sampler.check_installed()
    monkeypatch.setattr(
        sampler, "find_spec", lambda name: None if name == "optuna" else find_spec(name)
    )
    with pytest.raises(UsageError, match=r"needs optuna.*pip install 'orchestrator\[search\]'$"):
        sampler.check_installed()


def test_gp_and_tpe_learn_from_losses():
    """Points after good losses on one side lie nearer to it than after good ones on the other."""
    grid = [((x, 0.0, 0.0, 0.0), x) for x in (-0.9, -0.6, -0.3, 0.3, 0.6, 0.9)]
    for name in ("gp", "tpe"):
        left, right = (
            ask([(p, sign * v) for p, v in grid], BOUNDS, 2, sampler=name, seed=1)
            for sign in (1, -1)
        )
        assert math.fsum(p[0] for p in left) < math.fsum(p[0] for p in right)
