"""Weights & Biases: a run of the project `orchestrator`, or of the one in WANDB_PROJECT.

WANDB_MODE=offline keeps it on this machine. A resumed run has the same id, a hash of its run
directory. The steps of each group are a series of their own, `GROUP/step`.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import wandb

from orchestrator.tracking.base import TrackedRun

LOGIN_SECONDS = 30
"""Time for which a login on a terminal is waited for."""


class WandbTracker:
    """Run of wandb."""

    def __init__(self, run: TrackedRun) -> None:
        settings = wandb.Settings(silent=True, console="off", login_timeout=LOGIN_SECONDS)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.group),
            name=run.name,
            id=hashlib.blake2b(run.place.encode(), digest_size=8).hexdigest(),
            resume="allow",
            dir=run.beside,
            config=dict(run.settings),
            settings=settings,
        )
        self._groups: set[str] = set()

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log(
            {f"{group}/{name}": value for name, value in values.items()} | {f"{group}/step": step}
        )

    def end(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "done" else 1)
