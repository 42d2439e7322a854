"""Statements of fields: defaults, types, limits and choices are read from one place."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.evaluation import EvaluationRequest
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import about, check_fields, described, option, required
from orchestrator.recipe.recipe import SCHEDULE, Recipe


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Two described fields, and one without a description."""

    place: str = dataclasses.field(metadata=required("where", not_empty=True))
    count: int | None = option(None, "how many", at_least=2, schedule=True)
    free: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)


def test_a_field_is_one_statement():
    """Default, help text, limit and schedule of a field come from its definition."""
    fields = described(Toy)
    assert [*fields] == ["place", "count"]
    assert about(fields["count"]).help == "how many"
    assert Toy(place="here").count is None
    assert Toy(place=Path("a/b"), count=2) == Toy(place="a/b", count=2)
    with pytest.raises(UsageError, match="count is 1; it must be 2 or above"):
        Toy(place="here", count=1)
    with pytest.raises(UsageError, match="count is 'two'; it must be a whole number"):
        Toy(place="here", count="two")
    with pytest.raises(UsageError, match="place is empty"):
        Toy(place="")
    with pytest.raises(TypeError, match="place"):
        Toy()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"workers": "3..2"}, "MIN..MAX"),
        ({"threads": 0}, "threads is 0; it must be 1 or above"),
        ({"executor": "dask"}, "executor is 'dask'; it must be one of local, ray"),
    ],
)
def test_a_recipe_and_an_evaluation_share_the_checks_of_their_execution(given, says):
    """A value of execution that a recipe refuses is refused of an evaluation, in equal words."""
    for make in (
        lambda: Recipe(model="m", out="o", keep=0.8, **given),
        lambda: EvaluationRequest(model="m", text="t", **given),
        lambda: check_fields(Execution(**given)),
    ):
        with pytest.raises(UsageError, match=says):
            make()


def test_the_schedule_is_that_of_the_execution_and_of_four_other_fields():
    """All fields of an execution belong to the schedule; `seed` does not."""
    others = {"out", "download", "allow_infeasible", "expert_groups"}
    assert {*SCHEDULE} == {*described(Execution), *others}
    assert "seed" not in SCHEDULE
