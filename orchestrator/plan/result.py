"""Result of a compression."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.plan import Plan
from orchestrator.plan.speed import speed_forecast
from orchestrator.store.places import Place

REPORT_FILE = "orchestrator_report.json"
"""Name of the report in a checkpoint."""
BENCH_SUFFIX = ".bench.json"
"""End of the name of the file with a checkpoint's speed, beside it."""


def kept_bytes(report: Mapping[str, Any]) -> float | None:
    """Kept fraction of the targeted linears in bytes, by a report; None if it has no sizes."""
    sizes = report.get("bytes", {})
    dense = sizes.get("dense_linears")
    return sizes.get("stored", 0) / dense if dense else None


def rank_multiples(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Numbers of which ranks are multiples, and their cost, as text; None if all ranks are allowed.

    The cost is the predicted loss over that of a plan with every rank, where it is known.
    """
    said = report.get("rank_multiple", {})
    steps = [step for step in said.get("linears", {}) if step != "1"]
    if not steps:
        return None
    found, free = said["predicted_loss"], said.get("predicted_loss_of_every_rank")
    cost = ""
    if free:
        relation = "above" if found >= free else "below"
        cost = f"predicted loss {abs(found / free - 1):.2%} {relation} that with any rank"
    return f"multiples of {' and '.join(steps)}", cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Compressed checkpoint, run directory, plan and report of a compression."""

    out: Place
    """The compressed checkpoint."""
    run_dir: Place
    """Its run directory, from which further sizes can be cut."""
    plan: Plan
    report: dict[str, Any]
    """The content of `REPORT_FILE`."""

    @property
    def speed_forecast(self) -> dict[str, Any]:
        """Forecast of the speed of the linears: `orchestrator.plan.speed.speed_forecast`."""
        return speed_forecast(self.report)
