"""Events and records of runs under faults."""

import json
import os
import time

from drivers import is_alive, wait_for


class Once:
    """True at the first call in any process, then False."""

    def __init__(self, path):
        self._path = str(path)

    def __call__(self):
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class Seen:
    """Events of a run."""

    def __init__(self, and_then=None):
        self.events = []
        self._and_then = and_then

    def __call__(self, event):
        self.events.append(event)
        if self._and_then is not None:
            self._and_then(event)

    def named(self, name):
        return [event for event in self.events if event["event"] == name]

    @property
    def workers(self):
        return [worker for event in self.named("workers") for worker in event["workers"]]

    def all_are_gone(self):
        return wait_for(lambda: not any(is_alive(worker["pid"]) for worker in self.workers))


def records(run_dir):
    """Records of the failures of a run, in order."""
    return [json.loads(path.read_text()) for path in sorted((run_dir / "failures").iterdir())]


def wait_until_there_are(count, directory, pattern):
    """Wait until others have left this many files; for a worker that is to be late."""
    while sum(1 for _ in directory.rglob(pattern)) < count:
        time.sleep(0.05)
