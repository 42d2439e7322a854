"""List of what happened in a run: its events other than progress."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.pages import tables
from orchestrator.pages.markup import Markup, element, section
from orchestrator.pages.tables import cell, number, row_head

UNLISTED = frozenset({"stage", "unit", "progress", "surveyed", "finishing", "epoch"})
"""Events that are not listed: their number is that of units and chunks."""
SHOWN_EVENTS = 40
"""Number of journal events shown, the last ones; a run of days has thousands."""
_APART = ("event", "time", "times")


def happened(events: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Section with the last events; `times` of an event is the number of equal ones in a row."""
    if not events:
        return None
    rows = []
    for event in events[-SHOWN_EVENTS:]:
        times = f"{event['times']:,} times" if event.get("times", 1) > 1 else ""
        rows.append([row_head(str(event.get("event"))), cell(_told(event), "wide"), number(times)])
    left_out = len(events) - len(rows)
    said = f"The last {len(rows)} of {len(events):,}." if left_out > 0 else None
    return section(
        "What happened",
        element("p", said) if said else None,
        tables.table([], rows, label="journal"),
    )


def _told(event: Mapping[str, Any]) -> str:
    """Describe an event in words; one of an unknown kind by its fields."""
    match event:
        case {"event": "note", "text": text}:
            return str(text)
        case {"event": "run", "state": "begin"}:
            return "begins"
        case {"event": "run", "state": state}:
            code = f", exit code {event['exit_code']}" if event.get("exit_code") else ""
            return f"ends: {state}{code}" + (f": {event['error']}" if "error" in event else "")
        case {"event": "workers", "workers": list(workers)}:
            nodes = Counter(str(each["node"]) for each in workers if _has_node(each))
            return ", ".join(f"{count} on {node}" for node, count in nodes.items())
        case {"event": "lost" | "failed", "unit": unit, "cause": cause, "why": why}:
            where = f"process {event.get('pid')} on {event.get('node')}"
            then = f"{event.get('decided')}, see {event.get('record')}"
            return f"{unit}: {where} {cause}: {why}; {then}"
        case {"event": "waiting", "for": awaited}:
            return f"for {awaited}; available: {event.get('there')}"
        case {"event": "draining" | "quarantined", "node": node}:
            return str(node)
        case {"event": "retired" | "returned", "node": node, "pid": pid}:
            return f"process {pid} on {node}"
    fields = {name: value for name, value in event.items() if name not in _APART}
    return ", ".join(f"{name} {tables.plain(each)}" for name, each in tables.flat(fields).items())


def _has_node(worker: object) -> bool:
    return isinstance(worker, Mapping) and "node" in worker
