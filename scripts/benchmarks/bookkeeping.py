"""Cost of bookkeeping: journal, status, manifests and hashes of an undisturbed run.

Driver and worker are one process, so no other work runs beside the timed one.
"""

import argparse
import functools
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.figures import Figure, print_figures, print_table
from benchmarks.methods import compress

from orchestrator.stages import driver
from orchestrator.store import files
from orchestrator.store.run import RunDirectory

LIMIT = 0.02
FUNCTIONS = ("digest_file", "digest_json", "write_json")
METHODS = ("append", "write_status", "flush")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", type=Path, required=True)
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="holds wikitext2/")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/bookkeeping"))
    parser.add_argument("--method", default="svd-llm")


def run(options: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    clock = Clock()
    clock.watch_all()
    begun = time.monotonic()
    row = {"method": options.method, "executor": "local"}
    compress(options, row, "out", keep=0.8)
    wall = time.monotonic() - begun
    spent = sum(clock.seconds.values())
    figure = Figure(
        name="journal, status, manifests and hashes, of the wall time",
        measured=spent,
        reference=wall,
        unit="s",
        ratio=spent / wall,
        target=LIMIT,
    )
    print_table(
        [("", "calls", "seconds")]
        + [(name, str(clock.calls[name]), f"{clock.seconds[name]:.3f}") for name in clock.seconds]
    )
    print_figures([figure])
    return {"figures": [figure.to_json()], "seconds": clock.seconds, "calls": clock.calls}


class Clock:
    """Timer of functions, wherever they are called from; includes the functions that they call."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*FUNCTIONS, *METHODS), 0.0)
        self.calls = dict.fromkeys(self.seconds, 0)
        self._within = threading.local()

    def watch_all(self) -> None:
        assert driver, "everything that calls them is imported"
        for name in FUNCTIONS:
            plain = getattr(files, name)
            timed = self._timed(name, plain)
            for module in list(sys.modules.values()):
                if getattr(module, name, None) is plain:
                    setattr(module, name, timed)
        for name in METHODS:
            setattr(RunDirectory, name, self._timed(name, getattr(RunDirectory, name)))

    def _timed(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def timed(*arguments: Any, **options: Any) -> Any:
            if getattr(self._within, "any", False):
                return plain(*arguments, **options)
            self._within.any = True
            begun = time.monotonic()
            try:
                return plain(*arguments, **options)
            finally:
                self.seconds[name] += time.monotonic() - begun
                self.calls[name] += 1
                self._within.any = False

        return timed
