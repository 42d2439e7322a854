"""Units of an earlier run that can be reused: intact, and produced in an equivalent environment.

A unit's key covers everything that decides its bits except the environment (kind of device, library
versions, threads), which is in its manifest. The version of this package is there too, but decides
nothing: a unit whose bits change has another version in its key.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from orchestrator.readable import counted
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.verify import verified_units
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.store.places import Place
from orchestrator.store.units import PACKAGE, Units, is_equivalent

Name = TypeVar("Name", bound=Hashable)
Files = Sequence[tuple[Place, str]]


def reusable_units(
    units: Units,
    keys: Mapping[Name, str],
    workers: WorkerGroup,
    monitor: RunMonitor,
    *,
    stage: str,
    called: str = "{}",
    files: Callable[[Name, Mapping[str, Any]], Files | None] | None = None,
    is_all: bool = True,
) -> dict[Name, dict[str, Any]]:
    """Facts of the committed units that this run reuses; the hashes of their files are verified.

    Units of an equivalent environment are reused always. Units of another one are reused if all
    units of the stage exist from it, so that they are alike; if some are missing or damaged, none
    is, unless the workers allow mixed environments. Units of another environment are announced and
    listed in the report: the result then equals that of one environment within rounding, not bit
    for bit. A search that measures in rounds is judged round by round.

    Args:
        called: Format of a unit's name in messages: `block {}`.
        files: Files of a unit with their BLAKE2b, by its name and facts; None if they are not where
            this run would write them. Without it, the files that its manifest names.
        is_all: Whether these units are all units of the stage.
    """
    there = {name: found for name, key in keys.items() if (found := units.manifest(key))}
    listed = {
        name: files(name, found["facts"]) if files else units.hashes(keys[name])
        for name, found in there.items()
    }
    whole = verified_units(
        workers, monitor, {called.format(name): each for name, each in listed.items() if each}
    )
    there = {
        name: found
        for name, found in there.items()
        if listed[name] is not None and (not listed[name] or called.format(name) in whole)
    }
    refused = _reject_mixed(
        {name: found["environment"] for name, found in there.items()},
        workers,
        monitor,
        stage=stage,
        wanted=len(keys),
        is_all=is_all,
    )
    return {name: found["facts"] for name, found in there.items() if name not in refused}


def _reject_mixed(
    made: Mapping[Name, Mapping[str, Any]],
    workers: WorkerGroup,
    monitor: RunMonitor,
    *,
    stage: str,
    wanted: int,
    is_all: bool,
) -> set[Name]:
    """Units of another environment that are not reused; the decision is announced.

    Args:
        made: Environments of the committed units.
        wanted: Number of units, committed or not.
        is_all: Whether these units are all units of the stage.
    """
    others = {
        name: each for name, each in made.items() if not is_equivalent(each, workers.environment)
    }
    if not others:
        return set()
    first = next(iter(others.values()))
    is_complete = is_all and len(others) == wanted
    is_complete = is_complete and all(is_equivalent(each, first) for each in others.values())
    was = "was" if len(others) == 1 else "were"
    what = f"{len(others)} of {counted(wanted, 'unit')} of {stage} {was} made with "
    what += _differences(first, workers.environment)
    if is_complete or workers.execution.allow_mixed:
        monitor.note(f"{what}: reused; the result is not bit-identical to a single-environment run")
        monitor.add_made_elsewhere(stage, len(others), first)
        return set()
    monitor.note(f"{what}: made again, because others are missing; --allow-mixed reuses them")
    return set(others)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Differences of another environment from this one."""
    return ", ".join(
        f"{name} {there.get(name, 'unknown')} (here {value})"
        for name, value in here.items()
        if name != PACKAGE and there.get(name) != value
    )
