"""Page of a run of `evaluate`: quality, speed and size of a model, and its tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import InputError
from orchestrator.pages.evaluations import (
    before_and_after,
    evaluated_text,
    task_rows,
    task_table,
)
from orchestrator.pages.happened import happened
from orchestrator.pages.markup import Markup, element, joined, page, section
from orchestrator.pages.sources import told_events, unit_facts
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory
from orchestrator.version import __version__

KIND = "evaluate"
"""Field of a description by which a run is one of `evaluate`."""


def is_evaluation(description: Mapping[str, Any]) -> bool:
    """Return True for the description of a run of `evaluate`."""
    return KIND in description


def evaluation_page(place: Place) -> Markup:
    """Compose the page of all results in the run directory.

    Raises:
        InputError: There is no result yet.
    """
    models = RunDirectory(place).description()[KIND]
    found = [facts for facts in unit_facts(place) if facts.get("models", {}).get("model")]
    if not found:
        raise InputError(f"{place}: the evaluation has no result yet")
    model = _name(models["model"])
    against = f", compared with {_name(models['against'])}" if "against" in models else ""
    return page(
        f"{model}: evaluation",
        element("h1", model),
        element("p", f"evaluation of {model}{against}", class_="soft"),
        evaluation_section(found, "Quality, speed and size"),
        happened(list(told_events(place))),
        element("footer", f"Made by orchestrator {__version__}; run directory {place}."),
    )


def evaluation_section(found: Sequence[Mapping[str, Any]], title: str) -> Markup | None:
    """Section of the results on texts and on tasks; None without a result."""
    if not found:
        return None
    texts = [facts for facts in found if "text" in facts or "tasks" not in facts]
    shown = [
        joined([element("p", evaluated_text(facts)), before_and_after(facts)]) for facts in texts
    ]
    if rows := task_rows(found):
        says = "Tasks, with standard errors; retention is above chance where a task states it."
        shown.append(joined([element("p", says), task_table(rows)]))
    return section(title, *shown)


def _name(path: object) -> str:
    return str(path).rstrip("/").rpartition("/")[2]
