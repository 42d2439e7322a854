"""Process that is forked: it has imported torch and transformers, but neither Ray, which reads its
environment as it is imported, nor this package.

It ends, and its forks with it, when its standard input is closed.
"""

import gc
import json
import os
import random
import runpy
import selectors
import shlex
import signal
import socket
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

import aiohttp  # noqa: F401  the imports of Ray
import google.protobuf.json_format  # noqa: F401
import grpc  # noqa: F401
import jsonschema  # noqa: F401
import requests  # noqa: F401
import torch  # noqa: F401
import transformers.modeling_utils
import transformers.models.llama.modeling_llama  # noqa: F401

Request = dict[str, Any]
WORKER = "default_worker.py"


class Server:
    """Forks on request, and tells each that asked how its fork has ended."""

    def __init__(self, address: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(address)
        self._listening.listen(100)
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector = selectors.DefaultSelector()
        for each in (self._listening, self._woken, 0):
            self._selector.register(each, selectors.EVENT_READ)
        self._forks: dict[int, socket.socket] = {}

    def requested(self) -> Request:
        """Return in a fork, with what it is to do."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    request = self._fork()
                    if request is not None:
                        return request
                elif key.fileobj == self._woken:
                    os.read(self._woken, 1000)
                    self._reap()
                elif key.fileobj == 0:
                    self._end()
                elif key.data in self._forks:
                    # the process that asked is gone; its fork is not reaped yet
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self) -> Request | None:
        asking, _ = self._listening.accept()
        size, descriptors, _, _ = socket.recv_fds(asking, 8, 3)
        with asking.makefile("rb") as file:
            content = file.read(int.from_bytes(size, "big"))
        # without descriptors, the process was killed as it asked
        pid = os.fork() if descriptors else None
        if pid != 0:
            for each in descriptors:
                os.close(each)
            if pid is not None:
                _tell(asking, pid)
                self._selector.register(asking, selectors.EVENT_READ, pid)
                self._forks[pid] = asking
            return None
        # Ray ends whole process groups
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for each in (self._woken, self._wake):
            os.close(each)
        for each in (asking, self._listening, *self._forks.values()):
            each.close()
        for number, each in enumerate(descriptors):
            os.dup2(each, number)
            os.close(each)
        request: Request = json.loads(content)
        return request

    def _reap(self) -> None:
        while self._forks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            asking = self._forks.pop(pid)
            if asking in self._selector.get_map():
                self._selector.unregister(asking)
                _tell(asking, os.waitstatus_to_exitcode(status))
            asking.close()

    def _end(self) -> None:
        for pid in self._forks:
            os.kill(pid, signal.SIGKILL)
        sys.exit()


def _tell(asking: socket.socket, number: int) -> None:
    # it may have been killed
    with suppress(OSError):
        asking.sendall(number.to_bytes(8, "big", signed=True))


def begin(request: Request) -> list[str]:
    """Give this process the environment of the one that asked. Returns its command."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    sys.path[:] = request["paths"]
    random.seed()
    command: list[str] = request["command"]
    return command


def own_command(command: list[str]) -> list[str]:
    """Return the command of a worker of Ray that `setup_worker.py` would execute.

    As there, its options give the variables of its runtime environment.
    """
    names = [os.path.basename(each) for each in command]
    if WORKER not in names[1:]:
        return command
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    setup = ("--serialized-runtime-env-context=", "--language=")
    found = [each.removeprefix(setup[0]) for each in command if each.startswith(setup[0])]
    context = RuntimeEnvContext.deserialize(found[0] if found else "{}")
    update_envs(context.env_vars)
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [*paths, *(each for each in sys.path if each not in paths)]
    if context.command_prefix:
        change, directory, then = context.command_prefix
        assert (change, then) == ("cd", "&&")
        os.chdir(*shlex.split(directory))
    assert not context.override_worker_entrypoint
    return [each for each in command[names.index(WORKER) :] if not each.startswith(setup)]


def execute(command: list[str]) -> None:
    """Run the command as Python does that is started with it."""
    flag, *others = command
    if flag == "-c":
        sys.argv[:] = ["-c", *others[1:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(main))
    elif flag == "-m":
        sys.argv[:] = ["-m", *others[1:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        sys.path.insert(0, os.path.dirname(flag))
        runpy.run_path(flag, run_name="__main__")


if __name__ == "__main__":
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "threads do not survive a fork"
    gc.collect()
    gc.freeze()
    server = Server(sys.argv[1])
    print("ready", flush=True)
    execute(own_command(begin(server.requested())))
