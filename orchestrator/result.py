"""What a compression gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a compression gave."""

    out: Path
    """The compressed checkpoint."""
    run_dir: Path
    """Its run directory, from which further sizes can be cut."""
    plan: Plan
    report: dict[str, Any]
    """The content of `orchestrator_report.json`."""
