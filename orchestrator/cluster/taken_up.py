"""What an earlier run has left that this one goes on from, and what was made where bits may differ.

A unit's key says everything that decides its bits but the environment: device kind, versions of
libraries, threads. That stands in its manifest.
"""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from orchestrator.cluster.crew import Crew
from orchestrator.cluster.watch import Watch
from orchestrator.store.units import Units

Name = TypeVar("Name", bound=Hashable)


def taken_up(
    units: Units,
    keys: Mapping[Name, str],
    crew: Crew,
    watch: Watch,
    stage: str,
    *,
    is_all: bool = True,
) -> dict[Name, dict[str, Any]]:
    """Facts of the committed units that this run goes on from.

    Those of this environment always. Those of another one if a stage is complete there, so that its
    units are alike; of a stage that was left unfinished none, unless the crew mixes. What was made
    elsewhere is said, and stands in the report: the result is then equal to what one environment
    gives within rounding, not to the bit.

    Args:
        is_all: Whether these units are all that the stage makes.
    """
    there = {name: found for name, key in keys.items() if (found := units.manifest(key))}
    others: dict[Name, Mapping[str, Any]] = {
        name: found["environment"]
        for name, found in there.items()
        if found["environment"] != crew.environment
    }
    if others:
        first = next(iter(others.values()))
        is_complete = (
            is_all and len(others) == len(keys) and all(each == first for each in others.values())
        )
        what = f"{len(others)} of {len(keys)} units of {stage} were made with "
        what += _differences(first, crew.environment)
        if is_complete or crew.allows_mixed:
            watch.note(f"{what}: taken as they are, so the result has not the bits of one machine")
            watch.made_elsewhere.append(
                {"stage": stage, "units": len(others), "environment": dict(first)}
            )
        else:
            watch.note(f"{what}: made again, since others are missing; --allow-mixed takes them")
            there = {name: found for name, found in there.items() if name not in others}
    return {name: found["facts"] for name, found in there.items()}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What of an environment is not as it is here."""
    return ", ".join(
        f"{name} {there.get(name, 'unknown')} (here {value})"
        for name, value in here.items()
        if there.get(name) != value
    )
