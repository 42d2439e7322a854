"""Result of a compression."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.plan import Plan
from orchestrator.store.places import Place

REPORT_FILE = "orchestrator_report.json"
"""Name of the report in a checkpoint."""


def kept_bytes(report: Mapping[str, Any]) -> float | None:
    """Kept fraction of the targeted linears in bytes, by a report; None if it has no sizes."""
    sizes = report.get("bytes", {})
    dense = sizes.get("dense_linears")
    return sizes.get("stored", 0) / dense if dense else None


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
