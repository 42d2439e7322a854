"""Section of a report on the peak memory of a worker by stage, compared with the forecast."""

from collections.abc import Mapping
from typing import Any

from orchestrator.pages import tables
from orchestrator.pages.markup import Markup, section
from orchestrator.pages.tables import DASH, head, number, row_head
from orchestrator.readable import size
from orchestrator.usage import Usage


def memory(timings: Mapping[str, Any]) -> Markup | None:
    """Table with one row per stage: host memory, and with GPUs device memory and its forecast."""
    stages = timings.get("memory", {})
    if not stages:
        return None
    used = {stage: Usage.from_json(said) for stage, said in stages.items()}
    heads = ["stage", "host"]
    if any(each.device for each in used.values()):
        heads += ["device, allocated", "reserved", "context", "forecast", "measured over forecast"]
    rows = [
        [row_head(stage), *_cells(usage, stages[stage].get("forecast"))[: len(heads) - 1]]
        for stage, usage in used.items()
    ]
    shown = [head(name, "n" if place else "") for place, name in enumerate(heads)]
    return section("Memory of a worker", tables.table(shown, rows, label="memory by stage"))


def _cells(usage: Usage, forecast: float | None) -> list[Markup]:
    host = number(size(usage.host), usage.host)
    if usage.device is None:
        return [host, *[number(DASH)] * 5]
    device = usage.device
    measured = [device.allocated, device.reserved, device.context]
    share = device.total / forecast if forecast else None
    return [
        host,
        *(number(size(each), each) for each in measured),
        number(DASH if forecast is None else size(forecast), forecast),
        number(DASH if share is None else f"{share:.2f}", share),
    ]
