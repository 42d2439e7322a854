"""Processes that tests start, forked from one that has imported torch and transformers.

A process of Ray's that runs a worker, and a command of ours, spend several seconds of a core on
these imports and less than one on all the rest. They stay processes of their own, which execute
the same program from its first line with their own arguments, environment and descriptors; only
what is imported from elsewhere is there already. `sitecustomize` asks for the fork in the process
that was started, which then stands for it; `server` is the process that is forked. Limits and
namespaces are those of the server, which a program with its own must not be forked from.

`scripts/test` starts one server for all of its processes, and has the processes of pytest forked
too; otherwise a process of pytest starts a server when it first needs one.
"""

import atexit
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


@cache
def fork_processes() -> None:
    """Let the processes of Ray that are started from now on be forked."""
    if "FORK_SERVER" in os.environ:
        return
    directory = tempfile.TemporaryDirectory(prefix="or-")
    address = Path(directory.name, "server")
    server = subprocess.Popen(
        [sys.executable, HERE / "server.py", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["FORK_SERVER"] = str(address)

    def end() -> None:
        with server:
            server.stdin.close()
        directory.cleanup()

    atexit.register(end)
