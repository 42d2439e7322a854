"""Runs the parts in a separate process, and starts another one if that ends or hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import Results

ROOT = Path(__file__).parents[3]
PROGRAM = (sys.executable, "-m", "benchmarks.gpu.worker")
PATIENCE = 3
"""Times the expected seconds that a part may take."""
GRACE_SECONDS = 60
"""Seconds in addition, for imports from a cold disk and for other load."""
GLANCE_SECONDS = 0.2


def child_environ() -> dict[str, str]:
    """Environment of the processes: the path of modules, and the CUDA variables of workers."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # without it cuBLAS refuses to work under deterministic algorithms
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    places = [str(ROOT / "scripts"), str(ROOT), str(ROOT / "tests" / "support")]
    places += filter(None, [os.environ.get("PYTHONPATH")])
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(places)}


def read_environment() -> dict[str, Any]:
    """Output of `benchmarks.gpu.environment` on this machine."""
    command = [sys.executable, "-m", "benchmarks.gpu.environment"]
    done = subprocess.run(command, env=child_environ(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def supervise(
    results: Results,
    names: Sequence[str],
    work: Path,
    deadline: float,
    *,
    program: Sequence[str] = PROGRAM,
) -> None:
    """Run every part; a part that no process can run has an error as its result.

    Args:
        work: A directory for the files of parts.
        deadline: End of the time for all parts, on the system's monotonic clock.
        program: Command that runs parts; `benchmarks.gpu.worker`.
    """
    while todo := [name for name in names if name not in results.parts]:
        how = monitor(
            [*program, str(results.path), str(work), str(deadline), *todo], results.path, deadline
        )
        results = Results.read(results.path)
        if results.running is not None:
            part, _ = results.running
            results.end(part, {"error": f"its process {how}"})
            print(f"{part}: FAILED, its process {how}", flush=True)
        elif todo[0] not in results.parts:
            for name in todo:
                results.end(name, {"error": f"the process that was to run it {how}"})
                print(f"{name}: FAILED, {results.parts[name]['error']}", flush=True)


def monitor(command: Sequence[str], path: Path, deadline: float) -> str:
    """Run a worker to its end, or stops it with its children if a part takes too long."""
    process = subprocess.Popen(command, env=child_environ(), start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(GLANCE_SECONDS)
            if overrun := overrun_of(Results.read(path), deadline):
                return overrun
        return f"ended with status {process.returncode}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def overrun_of(results: Results, deadline: float) -> str | None:
    """Reason to stop the running part now; None if it may go on."""
    if results.running is None:
        return None
    part, spent = results.running
    if time.monotonic() > deadline:
        return f"was ended at the end of the time for all parts, {spent:.0f} s after it began"
    if spent > PATIENCE * PARTS[part].seconds + GRACE_SECONDS:
        return f"was ended after {spent:.0f} s; {PARTS[part].seconds:.0f} s were expected"
    return None
