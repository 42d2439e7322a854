"""The golden record holds: keys, plans, bits and stored files are unchanged.

See `golden_record` for the command that rewrites it.
"""

import json
import tarfile
from typing import Any

import pytest
from golden_cases import CASES, EVALUATED, INTERRUPTED, RETARGETED, VERIFIED
from golden_differences import differences, elsewhere
from golden_record import ARCHIVE, FORECASTS, RECORD, found_here

from orchestrator.allocate import ALLOCATORS
from orchestrator.methods import METHODS
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.field import about, described
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import Recipe

pytestmark = pytest.mark.slow
RECORDED: dict[str, Any] = json.loads(RECORD.read_text())
FORECAST: dict[str, Any] = json.loads(FORECASTS.read_text())
FINISHED = ("read", "calibrate", "pivot", "refine")
"""Stages that the unfinished runs had completed."""
SHOWN = 5
"""Number of differences that a failure lists."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Record of the current code; a separate process makes all of it in a minute."""
    return found_here(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def has_the_bits(found: dict[str, Any]) -> bool:
    """True if this environment computes the bits that the record was made with."""
    return bool(found["record"]["environment"] == RECORDED["environment"])


def check(expected: Any, actual: Any) -> None:
    """Fail with the first differences by name."""
    lines = list(differences(expected, actual))
    if lines:
        more = f"\n... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        pytest.fail("\n".join(lines[:SHOWN]) + more, pytrace=False)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_recorded_one(case, found, has_the_bits):
    """Keys, plan, units, tensors and files; if bits differ, only the parts that do not depend on
    them."""
    recorded, actual = RECORDED["cases"][case], found["record"]["cases"][case]
    if not has_the_bits:
        recorded, actual = elsewhere(recorded, recorded), elsewhere(actual, recorded)
    check(recorded, actual)


@pytest.mark.parametrize("case", RETARGETED)
def test_another_size_is_the_recorded_one(case, found, has_the_bits):
    """Compared like a run; no linear is decomposed for it."""
    recorded, actual = RECORDED["retargeted"][case], found["record"]["retargeted"][case]
    assert "calibrate" not in actual["told"]
    if not has_the_bits:
        recorded, actual = elsewhere(recorded, recorded), elsewhere(actual, recorded)
    check(recorded, actual)


@pytest.mark.parametrize("case", EVALUATED)
def test_an_evaluation_is_the_recorded_one(case, found, has_the_bits):
    """All figures except the speed, bit for bit; if bits differ, the counts of the text."""
    recorded, actual = RECORDED["evaluated"][case], found["record"]["evaluated"][case]
    if not has_the_bits:
        recorded, actual = recorded["text"], actual["text"]
    check(recorded, actual)


@pytest.mark.parametrize("case", VERIFIED)
def test_a_verification_is_the_recorded_one(case, found, has_the_bits):
    """Errors, logits and the exported dense checkpoint; no problem is reported."""
    recorded, actual = RECORDED["verified"][case], found["record"]["verified"][case]
    assert actual["found"]["problems"] == []
    if not has_the_bits:
        recorded, actual = sorted(recorded["exported"]), sorted(actual["exported"])
    check(recorded, actual)


@pytest.mark.parametrize("case", FORECAST)
def test_a_forecast_is_the_recorded_one(case, found):
    """Bytes, seconds and money of Llama 8B, in every environment."""
    check(FORECAST[case], found["forecasts"][case])


@pytest.mark.parametrize("case", INTERRUPTED)
def test_an_unfinished_run_of_the_record_is_resumed(case, found, has_the_bits):
    """No unit is made again, and the checkpoint equals that of an uninterrupted run."""
    actual = found["record"]["resumed"][case]
    assert not {*FINISHED} & actual["made"].keys()
    units = RECORDED["cases"][case]["units"]
    kept = {key for stage in FINISHED for key in units.get(stage, ())}
    assert kept
    assert not kept & {*actual["rewritten"]}
    if has_the_bits:
        check(RECORDED["resumed"][case], actual)
        check(RECORDED["cases"][case]["files"], actual["files"])


def test_the_archive_names_no_machine():
    """Relative paths, no owner, and no absolute path in the files of the runs."""
    with tarfile.open(ARCHIVE) as archive:
        for entry in archive:
            assert not entry.name.startswith("/")
            assert (entry.uid, entry.uname, entry.mtime) == (0, "", 0)
            if entry.name.endswith((".json", ".jsonl")):
                content = archive.extractfile(entry)
                assert content is not None
                text = content.read().decode()
                assert '"/' not in text
                assert "/tmp/" not in text


def test_every_choice_has_a_case():
    """Methods, allocations, presets, and every value of a recipe's choices except Ray's
    executor."""

    def named(field: str) -> set[Any]:
        return {fields.get(field) for fields in CASES.values()} - {None}

    assert named("method") == {*METHODS}
    assert named("preset") == {*PRESETS}
    own = {method.allocation for method in METHODS.values()}
    assert named("allocation") | own == {*ALLOCATORS}
    for choice in ("storage", "compensate", "refine", "train", "sampling", "layout"):
        missing = {*about(described(Recipe)[choice]).choices[1:]} - named(choice)
        assert not missing, choice
    recorded = [case["plan"]["assignments"].values() for case in RECORDED["cases"].values()]
    forms = {words.split()[1] for plan in recorded for words in plan}
    assert forms == {*FORMS}
    kinds = {
        words.split()[0]
        for case in RECORDED["cases"].values()
        for words in case["tensors"].values()
    }
    assert kinds >= {"F16", "BF16", "F32", "F64", "U8", "I16", "I32"}


def test_a_difference_is_told_by_name():
    """A changed, a missing and a new leaf give three lines."""
    expected = {"units": {"write": {"ab": "1", "cd": "2"}}, "key": "x"}
    actual = {"units": {"write": {"ab": "1", "ef": "2"}}, "key": "y"}
    assert list(differences(expected, actual)) == [
        "units / write / cd: is missing",
        "units / write / ef: is new",
        'key: recorded "x", found "y"',
    ]
