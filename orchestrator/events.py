"""Events of a run, as plain dicts: reported by drivers, pools and stages as they happen.

Known kinds:

    {"event": "stage", "stage": ..., "state": "begin" | "end", "seconds": ..., "busy": ...,
     "memory": ...}
    {"event": "unit", "stage": ..., "done": 3, "total": 30, "unit": ..., "block": 7, "seconds": ...,
     "node": ..., "pid": ...}
    {"event": "progress", "stage": ..., "done": 120, "total": 960, "of": "chunks", "fraction": 0.13,
     "left": ..., "run_left": ..., "running": [{"call": ..., "seconds": ...}, ...],
     "workers": 2, "failures": 0, "memory": ...}
    {"event": "note", "text": ..., "activity": True, "stage": ..., "blocks": [...], "step": ...}
    {"event": "waiting", "for": ..., "there": ...}
    {"event": "workers", "workers": [{"node": ..., "pid": ...}, ...]}
    {"event": "snapshot", "step": ..., "train": ..., "held_out": ..., ...}
    {"event": "lost" | "failed", "unit": ..., "why": ..., "cause": ..., "node": ..., "pid": ...,
     "decided": ..., "record": ...}
    {"event": "draining", "node": ..., "deadline": ...}
    {"event": "retired" | "returned", "node": ..., "pid": ...}
    {"event": "quarantined", "node": ...}
    {"event": "missing" | "damaged", "unit": ..., "why": ...}
    {"event": "run", "state": "begin" | "done" | "failed" | "stopped", "exit_code": ...,
     "error": ...}
    {"event": "surveyed", "blocks": 32, "group": 1, "linears": 224, "stages": [...]}
    {"event": "finishing", "block": 3, "unit": ..., "node": ..., "pid": ...}
    {"event": "epoch", "stage": ..., "block": 3, "losses": ...}

The last four are in the journal only. `finishing` is the start of the call that makes the unit of
a block, once all chunks have passed it. The unit of a block that was trained has its losses:
`"losses": {"train": [...], "held_out": [start, ...], "best": 2}`, by epoch. A unit has the `node`
and `pid` of its worker, unless several took part in it. `epoch` has the losses so far of a block
that is trained in order; blocks that are trained in parallel take one call each, which reports at
its end.

Other events are shown with their fields.

`activity` marks a note about work that now begins and takes seconds.

`progress` comes once a second from a thread of the driver while calls run, and every 5 s in the
journal: `done` of `total` in the unit `of`, the `fraction` of the stage's work by its cost, and the
seconds that are `left` of the stage and of the run, None while unknown (`progress.eta`). `block` is
there if a unit belongs to one block.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]
JOURNAL_ONLY = frozenset({"run", "surveyed", "finishing", "epoch"})
"""Events that the journal has for its readers, and that are not passed on."""
OnEvent = Callable[[dict[str, Any]], None]
"""Callback for the events of a run."""


def announce_imports(on_event: OnEvent | None) -> None:
    """Report that the heavy packages are about to be imported, which takes seconds."""
    if on_event is not None and "torch" not in sys.modules:
        text = "importing torch and transformers"
        on_event({"event": "note", "text": text, "activity": True})
