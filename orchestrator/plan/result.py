"""Result of a compression."""

from dataclasses import dataclass
from typing import Any

from orchestrator.plan.plan import Plan
from orchestrator.store.places import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Compressed checkpoint, run directory, plan and report of a compression."""

    out: Place
    """The compressed checkpoint."""
    run_dir: Place
    """Its run directory, from which further sizes can be cut."""
    plan: Plan
    report: dict[str, Any]
    """The content of `orchestrator_report.json`."""
