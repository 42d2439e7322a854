"""Time that is left, by closed forms."""

import pytest

from orchestrator.progress.eta import (
    Expected,
    Measured,
    Moment,
    Running,
    forecast_of_work,
    later_seconds,
    run_ratio,
    stage_left,
)


def moment(to_do, ended=(), running=(), *, workers=1, busy=1.0):
    """A moment whose workers were busy for this fraction of the time."""
    found = {kind: Measured(units, seconds) for kind, units, seconds in ended}
    calls = tuple(Running(*each) for each in running)
    spent = sum(each.seconds for each in found.values()) + sum(each.seconds for each in calls)
    return Moment(to_do=to_do, ended=found, running=calls, workers=workers, existed=spent / busy)


@pytest.mark.parametrize("done", [1, 50, 99])
@pytest.mark.parametrize("workers", [1, 4])
def test_uniform_work_takes_its_measured_time(done, workers):
    """n units of c seconds on N workers: (n - k) c / N are left after k, and k / n is done."""
    found = stage_left(
        moment({"step": 100 - done}, [("step", done, 3.0 * done)], workers=workers), {}
    )
    assert found.left == pytest.approx(3.0 * (100 - done) / workers)
    assert found.fraction == pytest.approx(done / 100)


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_a_second_kind_of_work_costs_its_forecast_times_the_ratio_of_the_first(scale):
    """A forecast that is wrong by any factor gives the same time once one kind is measured."""
    now = moment({"step": 30.0, "finish": 4.0}, [("step", 10.0, 20.0)])
    found = stage_left(now, {"step": 2.0 * scale, "finish": 25.0 * scale})
    assert found.left == pytest.approx(30 * 2.0 + 4 * 25.0)
    assert found.fraction == pytest.approx(20 / (20 + 160))


def test_before_any_call_has_ended_the_ratio_of_the_run_counts():
    """Without measurements a stage takes its forecast times the ratio so far."""
    assert stage_left(moment({"step": 10.0}), {"step": 2.0}, 3.0).left == pytest.approx(60.0)


def test_a_kind_is_unknown_without_measurement_and_forecast():
    """Then so is the time; a kind that differs in the head alone costs what the other does."""
    ended = [("forward", 10.0, 10.0)]
    assert stage_left(moment({"finish": 3.0}, ended), {}).left is None
    assert stage_left(moment({"finish": 0.0, "forward": 5.0}, ended), {}).left == pytest.approx(5.0)
    assert stage_left(moment({"score": 3.0}, ended), {}).left == pytest.approx(3.0)


def test_stored_units_are_not_counted():
    """The 10 units beside 90 of an earlier run take their own time."""
    assert stage_left(moment({"step": 9.0}, [("step", 1.0, 7.0)]), {}).left == pytest.approx(63.0)


def test_time_passes_within_a_call():
    """A running call has its seconds behind it, but not more than its cost."""
    ended, forecast = [("step", 4.0, 40.0)], {}
    for seconds, left in [(0.0, 20.0), (4.0, 16.0), (10.0, 10.0), (13.0, 10.0)]:
        now = moment({"step": 2.0}, ended, [("step", 1.0, seconds)])
        assert stage_left(now, forecast).left == pytest.approx(left)


def test_a_call_that_outlasts_its_forecast_raises_the_cost_of_its_kind():
    """As long as none of its kind has ended, the others take at least as long."""
    now = moment({"finish": 3.0}, running=[("finish", 1.0, 50.0)])
    assert stage_left(now, {"finish": 10.0}).left == pytest.approx(100.0)


def test_recent_calls_count_where_there_are_any():
    """The cost of a unit is that of the weighted calls; what was spent is that of all."""
    found = {"step": Measured(10.0, 100.0, 2.0, 10.0)}
    now = Moment(to_do={"step": 20.0}, ended=found, existed=100.0)
    assert stage_left(now, {}).left == pytest.approx(20 * 5.0)
    assert stage_left(now, {}).fraction == pytest.approx(0.5)


def test_loading_is_no_measure_of_computing():
    """A shard that took long to open says nothing about the cost of a step."""
    now = moment({"open": 3.0, "step": 10.0}, [("open", 1.0, 9.0)])
    found = stage_left(now, {"open": 0.1, "step": 2.0}, 1.5)
    assert found.left == pytest.approx(3 * 9.0 + 10 * 3.0)


def test_the_last_call_is_not_shared():
    """Eight workers do not shorten a single call."""
    now = moment({"step": 1.0}, [("step", 9.0, 90.0)], [("step", 1.0, 2.0)], workers=8)
    assert stage_left(now, {}).left == pytest.approx(8.0)


def test_idle_workers_make_it_longer():
    """Workers that were busy half of a long time are expected to be so."""
    now = moment({"step": 100.0}, [("step", 1000.0, 1000.0)], workers=2, busy=0.5)
    assert stage_left(now, {}).left == pytest.approx(100.0, rel=0.01)


def test_later_stages_are_scaled_by_what_was_measured():
    """Half of a forecast of 100 s took 500 s: a later forecast of 40 s is 200 s, within 5 %."""
    expected = Expected(stages={"calibrate": 100.0, "refine": 30.0, "write": 10.0})
    now = moment({"step": 50.0}, [("step", 50.0, 500.0)])
    work = forecast_of_work(now, {"step": 1.0}, 0.5)
    assert work == pytest.approx(50.0)
    later = later_seconds("calibrate", expected)
    assert later == 40.0
    assert later * run_ratio(500.0, work, expected) == pytest.approx(400.0, rel=0.05)
    assert later_seconds("evaluate", expected) is None
    assert forecast_of_work(now, {}, 0.5) is None
