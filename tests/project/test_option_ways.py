"""The ways of a recipe's fields, from the command line to where they are used, are short."""

import pytest
from option_ways import option_ways

LIMIT = 8


@pytest.fixture(scope="module")
def ways():
    return option_ways()


def test_a_way_is_found_as_it_is(ways):
    """A field is followed from its flag over properties and parameters to its last reader, and
    files that only use the same word are not counted."""
    assert ways["allow_infeasible"] == {
        "cli/flags.py",
        "recipe/recipe.py",
        "stages/admission.py",
    }
    assert ways["threads"] >= {
        "recipe/execution.py",
        "runtime/worker.py",
        "runtime/ray/cluster.py",
        "stages/context/decompose.py",
    }
    # the same word for the threads that add gradients, and for samples of a singular value
    assert "stages/context/gradients.py" not in ways["threads"]
    assert "allocate/cap.py" not in ways["samples"]


ALTERNATIVES = ("api", "cli/verbs")
"""Folders whose files are alternatives: a command runs one verb, which calls one function."""


def test_ways_are_short(ways):
    """A field is written in at most eight files, command line and definition included; of a folder
    of alternatives one is on a way."""

    def step(file: str) -> str:
        return next((folder for folder in ALTERNATIVES if file.startswith(f"{folder}/")), file)

    steps = {name: {step(file) for file in files} for name, files in ways.items()}
    assert {name: sorted(files) for name, files in steps.items() if len(files) > LIMIT} == {}
