"""Drivers in separate processes, to be killed and stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from forking import fork_processes

from orchestrator.store.places import parse_place
from orchestrator.store.run import RunDirectory

SMALL = ("--method", "svd-llm", "--keep", "0.5", "--samples", "6", "--sequence-length", "48")
"""Arguments that match `pipeline.run`, so that the results are the same bytes."""


def start(*command, forked=True, **options):
    """Start a process with text output, one thread and no colours.

    Unless it is forked it imports torch and transformers itself.
    """
    if forked:
        fork_processes()
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    if forked:
        environment["FORKED"] = "next"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, **pipes, **options)


class Driver:
    """Running `orchestrator compress`, with its events."""

    def __init__(self, model, out, text, *flags, **options):
        place = parse_place(str(out))
        self.run = RunDirectory(place.with_name(f"{place.name}.run"))
        arguments = [str(model), str(out), "--calibration", str(text), *SMALL, *flags]
        command = ["-m", "orchestrator", "compress", *arguments, "--progress", "json"]
        self.process = start(*command, **options)
        self.events, self.other = [], []

    def until(self, wanted):
        """Read events up to the first matching one, or all of them."""
        for line in self.process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                self.other.append(line)
                continue
            self.events.append(event)
            if wanted(event):
                return event
        return None

    def signal_and_time(self, number, *, again=None):
        """Return the seconds from the signal until the status is `stopped`, and until the exit."""
        stopped = []

        def monitor():
            while not stopped and self.process.poll() is None:
                if self.run.status()["state"] == "stopped":
                    stopped.append(time.monotonic() - sent)
                time.sleep(0.005)

        sent = time.monotonic()
        self.process.send_signal(number)
        thread = threading.Thread(target=monitor)
        thread.start()
        if again is not None:
            time.sleep(again)
            self.process.send_signal(number)
        self.end()
        thread.join()
        return stopped[0], time.monotonic() - sent

    def kill(self):
        """Kill the process of the run at once, which `process` stands for."""
        os.kill(self.run.status()["pid"], signal.SIGKILL)
        self.end()

    def end(self):
        """Wait for the end; returns the exit code."""
        self.until(lambda event: False)
        self.process.stdout.read()
        code = self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def is_unit(done, stage="calibrate"):
    """Return a predicate for the event that this many units of a stage are done."""
    return lambda event: event.get("stage") == stage and event.get("done") == done


def units(events, stage="calibrate"):
    """Return the number of finished units of a stage."""
    return sum(event["event"] == "unit" and event["stage"] == stage for event in events)


def wait_for(condition, seconds=240.0):
    """Wait for a condition; returns True if it became true in time.

    The default is long enough for all but a process that hangs: a test of a job of Ray that takes
    30 seconds alone has taken 140 beside other work.
    """
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_alive(pid):
    """Return True if a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_naming(text):
    """Return the processes whose command line contains a text."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and is_alive(entry):
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    if text.encode() in file.read():
                        found.add(int(entry))
            except OSError:
                continue
    return found
