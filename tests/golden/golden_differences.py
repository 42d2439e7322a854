"""Two golden records compared: what differs, by name, and what no environment changes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """One line for each leaf that is not the same, in the record's order."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in [*expected, *(name for name in found if name not in expected)]:
            below = f"{where} / {name}" if where else str(name)
            if name not in found:
                yield f"{below}: is missing"
            elif name not in expected:
                yield f"{below}: is new"
            else:
                yield from differences(expected[name], found[name], below)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{where} / {number}")
    elif expected != found:
        yield f"{where}: recorded {_short(expected)}, found {_short(found)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def elsewhere(case: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a case that depend on names, options and inputs alone, not on bits.

    Ranks depend on bits only where energies all but tie; where the plan is the recorded one, so are
    the keys of all units and all shapes. Masks are named by the bits of their candidates.
    """
    units = {stage: sorted(keys) for stage, keys in case["units"].items()}
    same_plan = case["plan"] == recorded["plan"] and "score" not in recorded["units"]
    early = {stage: units.get(stage) for stage in ("read", "calibrate")}
    plan = case["plan"]
    return {
        "key": case["key"],
        "plan": {"linears": sorted(plan["assignments"]), "budget": plan["budget_values"]},
        "files": sorted(case["files"]),
        "units": units if same_plan else early,
        "tensors": case["tensors"] if same_plan else None,
    }
