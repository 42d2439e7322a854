"""HTML pages about runs: one self-contained file, made from the files on disk.

`sources` reads run directory, checkpoint and evaluations; `report` and `compare` compose the pages;
`figures` draws, `tables` lists, `markup` escapes. No module imports torch, Ray or transformers.
"""

from orchestrator.pages.compare import write_comparison
from orchestrator.pages.report import write_report

__all__ = ["write_comparison", "write_report"]
