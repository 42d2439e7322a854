"""Trackio: a run of the project `orchestrator`, or of the one in TRACKIO_PROJECT, on this machine
unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names a server.

A resumed run is continued by its name. The steps of each group are a series of their own,
`GROUP/step`, since Trackio counts the points of a run.
"""

import os
from collections.abc import Mapping

import trackio

from orchestrator.tracking.base import TrackedRun


class TrackioTracker:
    """Run of Trackio."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", run.group),
            name=run.name,
            config={name: str(value) for name, value in run.settings.items()},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        points = {f"{group}/{name}": value for name, value in values.items()}
        self._run.log(points | {f"{group}/step": step})

    def end(self, state: str) -> None:
        trackio.finish()
