"""Time that is left, replayed from recorded runs of SmolLM2-135M-Instruct (`record_runs`).

The machine was shared with other work, so that calls of one kind took up to twice as long at some
times as at others: an estimate has to bear that.
"""

import json
from pathlib import Path
from statistics import median

import pytest

from orchestrator.progress.eta import Measured, Moment, Running, stage_left

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
STAGES = [(path.stem, stage) for path in RECORDED for stage in json.loads(path.read_text())]
WARM_UP = 0.1
"""Fraction of a stage's time after which its estimates count."""
LARGEST_MEDIAN = 0.3


def replayed(stage):
    """Relative error of each estimate after the warm-up; None where the time is unknown."""
    errors = []
    for each in stage["moments"]:
        if not WARM_UP * stage["end"] < each["at"] < stage["end"]:
            continue
        moment = Moment(
            to_do=each["to_do"],
            ended={kind: Measured(*measured) for kind, measured in each["ended"].items()},
            running=[Running(*call) for call in each["running"]],
            workers=each["workers"],
            existed=each["existed"],
        )
        true, found = (
            stage["end"] - each["at"],
            stage_left(moment, stage["forecast"], each["ratio"]),
        )
        errors.append(None if found.left is None else abs(found.left - true) / true)
    return errors


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, id=f"{name}-{stage['stage']}") for name, stage in STAGES]
)
def test_the_time_that_is_left_is_right_within_a_third(stage):
    """After a tenth of a stage the time is known, and its median relative error is at most 0.3."""
    errors = replayed(stage)
    assert None not in errors
    assert len(errors) >= 5
    assert median(errors) <= LARGEST_MEDIAN


def test_recorded_runs_have_all_kinds_of_stages():
    """Passes with and without gradients, units of their own, and trainings."""
    assert {stage["stage"] for _, stage in STAGES} >= {"calibrate", "pivot", "refine", "train"}
