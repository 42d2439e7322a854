"""Events of a run, as plain dicts: reported by drivers, pools and stages as they happen.

Known kinds:

    {"event": "stage", "stage": ..., "state": "begin" | "end", "seconds": ..., "busy": ...}
    {"event": "unit", "stage": ..., "done": 3, "total": 30, "unit": ..., "seconds": ...}
    {"event": "note", "text": ...}
    {"event": "waiting", "for": ..., "there": ...}
    {"event": "workers", "workers": [{"node": ..., "pid": ...}, ...]}
    {"event": "snapshot", "step": ..., "train": ..., "held_out": ..., ...}
    {"event": "lost" | "failed", "unit": ..., "why": ..., "cause": ..., "node": ..., "pid": ...,
     "decided": ..., "record": ...}
    {"event": "draining", "node": ..., "deadline": ...}
    {"event": "retired" | "returned", "node": ..., "pid": ...}
    {"event": "quarantined", "node": ...}
    {"event": "missing" | "damaged", "unit": ..., "why": ...}

Other events are shown with their fields.
"""

from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]
OnEvent = Callable[[dict[str, Any]], None]
"""Callback for the events of a run."""
