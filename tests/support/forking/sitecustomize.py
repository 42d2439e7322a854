"""Imported by a Python process as it starts: it may ask for a fork that takes its place.

The process then only waits: it passes SIGTERM and SIGINT on, and ends as the fork ends. If it is
killed, the server kills the fork.
"""

import os
import sys

PROCESSES_OF_RAY = (
    "_private/log_monitor.py",
    "_private/runtime_env/agent/main.py",
    "autoscaler/_private/monitor.py",
    "dashboard/agent.py",
    "dashboard/dashboard.py",
)
WORKERS_OF_RAY = ("_private/workers/default_worker.py", "_private/workers/setup_worker.py")


def is_replaced(command: list[str]) -> bool:
    """True for processes of Ray, and for programs for which the variable FORKED asks.

    It is `next` for the process that is started with it alone, `all` for it and each that starts
    below, `commands` for each command of ours there, and `nodes` for none there, nor for workers.
    Never for `ray start`: whoever kills a node looks for its descendants.
    """
    program, *others = [*command, "", ""][:2]
    if program.endswith(WORKERS_OF_RAY):
        return os.environ.get("FORKED") != "nodes"
    if program.endswith(PROCESSES_OF_RAY) or (program, *others) == ("-m", "ray.util.client.server"):
        return True
    if os.environ.get("FORKED") in ("next", "all"):
        if os.environ["FORKED"] == "next":
            del os.environ["FORKED"]
        is_script = os.path.basename(program) == "orchestrator"
        return is_script or (program in ("-c", "-m") and others != ["ray.scripts.scripts"])
    is_ours = (program, *others) == ("-m", "orchestrator")
    return is_ours and os.environ.get("FORKED") == "commands"


def replace(address: str, command: list[str]) -> None:
    """Let a fork run the command; returns only if there is no server."""
    import json
    import signal
    import socket

    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address)
    except OSError:
        server.close()
        return
    request = {
        "command": command,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "paths": sys.path,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
    }
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    pid = int.from_bytes(server.recv(8), "big")
    if not pid:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int.from_bytes(server.recv(8) or b"\1", "big", signed=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if "FORK_SERVER" in os.environ:
    # -u: without buffers for output, which Ray's processes do not need
    found = [each for each in sys.orig_argv[1:3] if each != "-u"] + sys.orig_argv[3:]
    if is_replaced(found):
        replace(os.environ["FORK_SERVER"], found)
