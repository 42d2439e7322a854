"""A run as a page to look at: one HTML file that loads nothing, from what lies on disk.

`sources` reads run directory, checkpoint and evaluations; `report` and `compare` lay pages out;
`figures` draws, `tables` lists, `markup` escapes. Nothing here imports torch, Ray or transformers.
"""

from orchestrator.pages.compare import write_comparison
from orchestrator.pages.report import write_report

__all__ = ["write_comparison", "write_report"]
