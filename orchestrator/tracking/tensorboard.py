"""TensorBoard: one directory of event files per run, `tensorboard/NAME` beside the run directory.

A resumed run adds a file to the same directory, which TensorBoard joins to the earlier ones.
"""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from orchestrator.tracking.base import TrackedRun


class TensorboardTracker:
    """Writer of event files."""

    def __init__(self, run: TrackedRun) -> None:
        directory = Path(run.beside) / "tensorboard" / run.name
        self._writer = SummaryWriter(str(directory))
        rows = "".join(f"| {name} | {value} |\n" for name, value in run.settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")
        self._writer.flush()

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
        self._writer.flush()

    def end(self, state: str) -> None:
        self._writer.add_text("state", state)
        self._writer.close()
