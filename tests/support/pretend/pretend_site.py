"""Source line that causes an event of a simulated CUDA device; see `pretend`."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import orchestrator

PACKAGE, TESTS = str(Path(orchestrator.__file__).parent), str(Path(__file__).parents[2])


class Site(NamedTuple):
    """A line of the program."""

    file: str
    """Path in the package (`models/shards/shard.py`) or the checkout (`tests/hf/test_hf.py`)."""
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def site() -> Site:
    """The innermost line of the package on the stack; of the tests if there is none."""
    frame, test = sys._getframe(1), Site("elsewhere", 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return Site(path[len(PACKAGE) + 1 :], frame.f_lineno)
        if test.line == 0 and path.startswith(TESTS) and not _is_own(path):
            test = Site(os.path.join("tests", path[len(TESTS) + 1 :]), frame.f_lineno)
        frame = frame.f_back
    return test


def _is_own(path: str) -> bool:
    return os.path.basename(path).startswith("pretend")
