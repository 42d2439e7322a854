"""Simulated runs: call counts of the schedules, and closed forms of their time."""

import pytest
from large_models import CONFIGS

from orchestrator.forecast.forecast import costs_of, forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import Machine, Rates
from orchestrator.forecast.shapes import from_config
from orchestrator.forecast.simulate import simulate
from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import resolve

SMALL = CONFIGS["Llama-3-8B"] | {"num_hidden_layers": 12, "dtype": "bfloat16"}
FAST = dict.fromkeys(["half", "tf32", "single", "double", "eigen"], 1e12)
RATES = Rates(row="test", **FAST, read=1e10, write=1e10, network=1e10, start=30.0, source="none")


def costs(config=SMALL, **fields):
    fields = {"samples": 16, "sequence_length": 512, "keep": 0.8} | fields
    method = {} if "preset" in fields else {"method": "svd-llm"}
    recipe = make_recipe({"model": "m", "out": "o"} | method | fields)
    return costs_of(from_config(config, "test"), resolve(recipe))


def simulated(found, workers, **about):
    return simulate(found.shapes, found.recipe, RATES, workers, **about)


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
def test_one_worker_is_never_idle(method):
    """All calls are performed one after the other, each once."""
    for stage in simulated(costs(method=method), 1).values():
        assert stage.utilisation == pytest.approx(1.0)
        assert stage.repeated == stage.redone == stage.lost_nodes == 0


def test_the_units_are_those_of_a_run():
    """Every block once in each stage."""
    found = simulated(costs(method="two-sided", refine="blocks"), 4)
    assert list(found) == ["boundaries", "calibrate", "refine", "write"]
    assert found["calibrate"].units == found["refine"].units == 12
    assert found["boundaries"].units == 0


def test_stages_with_independent_calls_are_simulated():
    """The stages of the recipe are simulated in their order, under the names of the run."""
    found = simulated(costs(preset="best", refine="swept"), 4)
    names = ["boundaries", "calibrate", "pivot", "refine", "write"]
    assert list(found) == names
    assert [each.stage for each in found.values()] == ["calibrate", *names[1:]]


def test_pivoting_is_spread_over_all_workers():
    """One unit per linear, even if the result has few files."""
    each = costs(storage="pivoted")
    alone, many = simulated(each, 1)["pivot"], simulated(each, 8)["pivot"]
    assert each.files < 8
    assert alone.units == many.units == len(each.shapes.linears)
    assert alone.seconds == pytest.approx(8 * many.seconds, rel=0.15)


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
def test_more_workers_are_faster_and_no_faster_than_their_number(method):
    """The time is between that of one worker and that time divided by their number."""
    alone = simulated(costs(method=method), 1)["calibrate"].seconds
    times = [simulated(costs(method=method), n)["calibrate"].seconds for n in (2, 3, 6)]
    assert sorted(times, reverse=True) == times
    for workers, seconds in zip((2, 3, 6), times, strict=True):
        # more shards exchange more data
        assert alone / workers * 0.98 < seconds < alone


def test_a_wave_takes_its_closed_form():
    """With as many workers as shards the last one starts after the chunks have passed the others,
    and ends after its own work."""
    found = costs()
    calibrate = simulated(found, 6)["calibrate"]

    step = (found.gather(2) + found.comes() + found.goes()).overlapped(RATES)
    ends = (found.load(2) + found.finish().times(2)).overlapped(RATES)
    expected = ends + (16 + 5) * step
    assert calibrate.seconds == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
def test_lost_nodes_cost_time_and_no_unit(method):
    """Nodes are lost within seconds; every block is finished once, and lost passes are repeated."""
    whole = simulated(costs(method=method), 6)["calibrate"]
    losses = 0
    for seed in range(6):
        found = simulated(costs(method=method), 6, loss_hours=0.004, seed=seed)
        calibrate = found["calibrate"]
        assert (calibrate.units, calibrate.redone) == (12, 0)
        if calibrate.lost_nodes:
            assert calibrate.seconds > whole.seconds
            assert calibrate.utilisation < whole.utilisation
        losses += calibrate.lost_nodes
        assert found == simulated(costs(method=method), 6, loss_hours=0.004, seed=seed)
    assert losses > 2


def test_a_large_model_on_many_machines():
    """Workers without a block change no result."""
    config = SMALL | {"num_hidden_layers": 24}
    few = simulated(costs(config), 24)["calibrate"]
    many = simulated(costs(config), 1024)["calibrate"]
    assert many.seconds == few.seconds
    assert many.utilisation < 0.1


@pytest.mark.parametrize("method", ["svd-llm", "two-sided"])
@pytest.mark.parametrize("workers", [1, 2, 6])
def test_the_forecast_is_what_the_schedule_does(method, workers):
    """The closed form of a pass equals the real schedule's time, for workers that divide the
    blocks."""
    found = costs(method=method)
    machine = Machine("test", None, (RATES,))
    expected = forecast(
        found.shapes, found.recipe, Resources(workers=workers, machine=machine, memory_bytes=None)
    )
    seconds = sum(stage.seconds for stage in simulated(found, workers).values())
    assert expected.seconds["test"] - RATES.start == pytest.approx(seconds, rel=0.08)
