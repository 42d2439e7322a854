"""Events as sentences, for lines and for the live display."""

import time

from orchestrator.events import Event
from orchestrator.readable import duration
from orchestrator.stage_names import VERIFY

LONG_SECONDS = 5.0
"""Time after which a running call is named."""


def sentence(event: Event) -> str:
    """Return an event as text, without its time."""
    match event:
        case {"event": "stage", "state": "begin", "stage": stage}:
            return stage_text(stage)
        case {"event": "stage", "state": "end", "stage": stage}:
            busy = f", workers {event['busy']:.0%} busy" if "busy" in event else ""
            return f"{stage_text(stage)} done in {duration(event.get('seconds', 0.0))}{busy}"
        case {"event": "note", "text": text}:
            return str(text)
        case {"event": "waiting"}:
            return f"waiting for {event.get('for')}; available: {event.get('there')}"
        case {"event": "workers", "workers": workers}:
            return ", ".join(f"process {each['pid']} on {each['node']}" for each in workers)
        case {"event": "lost" | "failed", "record": record}:
            where = f"{event['unit']}: process {event['pid']} on {event['node']}"
            then = f"{event['decided']}, see {record}"
            return f"{where} {event['cause']}: {event['why']}; {then}"
        case {"event": "returned", "node": node, "pid": pid}:
            return f"process {pid} on {node} is returned: no work is left for it"
        case {"event": "draining", "node": node, "deadline": deadline}:
            left = max((deadline or 0.0) - time.time(), 0.0)
            when = f" in {duration(left)}" if deadline else ""
            return f"{node} drains{when}: its workers finish their calls, others take over"
        case {"event": "snapshot"}:
            train = "" if event["train"] is None else f"loss {event['train']:.4f} in training, "
            return f"step {event['step']}: {train}{event['held_out']:.4f} on held-out sequences"
    fields = ", ".join(f"{name} {value}" for name, value in event.items() if name != "event")
    return f"{event['event']}: {fields}"


def stage_text(stage: str) -> str:
    """Name of a stage for people: one name is also that of a command."""
    return "checking stored units" if stage == VERIFY else stage


def progress_text(event: Event) -> str:
    """Return one line about a stage: count, fraction, remaining times, and the longest call."""
    parts = [f"{stage_text(event['stage'])} {count_text(event)}"]
    if (times := times_text(event)) != "":
        parts.append(times)
    for call in event.get("running", ())[:1]:
        if call["seconds"] >= LONG_SECONDS:
            parts.append(f"{call['call']} for {duration(call['seconds'])}")
    return ", ".join(parts)


def count_text(event: Event) -> str:
    """Return done, total and fraction: `120/960 chunks, 13%`."""
    fraction = event.get("fraction")
    share = "" if fraction is None else f", {fraction:.0%}"
    return f"{event['done']}/{event['total']} {event['of']}{share}"


def times_text(event: Event) -> str:
    """Return the time that is left of the stage and of the run; empty if it is unknown."""
    left, run_left = event.get("left"), event.get("run_left")
    if left is None:
        return ""
    run = "" if run_left is None else f" of the stage, {duration(run_left)} of the run"
    return f"about {duration(left)} left{run}"
