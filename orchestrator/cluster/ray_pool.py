"""Workers as Ray actors, each pinned to one GPU, or to a share of the CPUs where there are none.

Everything here that Ray does not promise to keep stands in this module.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

import orchestrator
from orchestrator.cluster.pool import PATIENCE_SECONDS, Outcome
from orchestrator.cluster.schedule import Call
from orchestrator.errors import InfeasibleError, OrchestratorError, UsageError
from orchestrator.store.chunks import MissingChunk

CONNECT_SECONDS = 5.0
START_SECONDS = 120.0
_LOST = (ActorDiedError, ActorUnavailableError, OutOfMemoryError)

Announce = Callable[[dict[str, Any]], None]


def connect(address: str | None, announce: Callable[[str], None]) -> bool:
    """Joins a Ray cluster, or starts one in this machine; says whether it was this call's doing.

    Inside a script that has called `ray.init` that cluster is used. Inside a Ray job, where Ray
    names the cluster in `RAY_ADDRESS`, no address means that cluster. Workers on other nodes get
    this very package through the runtime environment.

    Raises:
        UsageError: Nothing answers at the address.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        announce("starting a Ray of its own on this machine")
        ray.init(include_dashboard=False, **options)
        return True
    announce(f"joining the Ray cluster at {address}")
    _check_answers(address)
    # the cluster's nodes need not have the package; they get the one that runs here
    options["runtime_env"] = {"py_modules": [str(Path(orchestrator.__file__).parent)]}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UsageError(f"address {address}: no Ray cluster answers: {_first(error)}") from error
    return True


def _check_answers(address: str) -> None:
    """Fails in seconds where Ray would try for minutes."""
    if address.startswith("ray://"):
        raise UsageError(
            f"address {address}: the Ray client is not supported; run on the cluster with "
            "`ray job submit`, or give the head's own address, host:6379"
        )
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"address {address}: no Ray cluster answers: {error}; give host:port of the head, "
            "`auto` on one of its nodes, or nothing for a Ray of its own"
        ) from error


def cluster_shares(threads: int | None) -> tuple[dict[str, float], int]:
    """What one worker asks for, and how many such workers the cluster can hold now."""
    there = ray.cluster_resources()
    cpus = threads or 1
    if there.get("GPU", 0) >= 1:
        return {"num_gpus": 1, "num_cpus": cpus}, int(min(there["GPU"], there["CPU"] // cpus))
    return {"num_gpus": 0, "num_cpus": cpus}, int(there.get("CPU", 0) // cpus)


def check_workers(workers: int, share: dict[str, float], most: int) -> None:
    """Raises InfeasibleError when the cluster can never hold so many workers."""
    if workers > most:
        there = {
            name: amount
            for name, amount in sorted(ray.cluster_resources().items())
            if name in ("CPU", "GPU")
        }
        raise InfeasibleError(
            f"workers: {workers} asked for, each with {_words(share)}; the cluster has "
            f"{_words(there)} on {len(ray.nodes())} nodes, enough for {most}; "
            "ask for fewer workers or threads, or add nodes"
        )


class RayPool:
    """Equal actors; a lost one is replaced, never restarted, because its memory is gone anyway.

    Actors have `max_restarts=0` and calls no retries: what to repeat, and where, is the dispatch
    loop's decision. Use as a context manager; leaving it kills the actors.
    """

    def __init__(
        self,
        worker_class: type,
        task: Any,
        *,
        workers: int,
        share: dict[str, float],
        threads: int,
        announce: Announce,
    ) -> None:
        variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._actor_class = ray.remote(
            **share,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables},
        )(worker_class)
        self._task = ray.put(task)
        self._announce = announce
        self._count = 0
        self._actors: dict[int, Any] = {}
        self._ready: dict[int, Any] = {}
        self._calls: dict[Any, tuple[Call, Any, list[Any]]] = {}
        for _ in range(workers):
            self._add()

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)
        self._actors, self._calls = {}, {}

    def _add(self) -> None:
        self._actors[self._count] = self._actor_class.remote(self._task)
        self._count += 1

    def workers(self) -> Sequence[int]:
        return list(self._actors)

    def probe(self, nonce: str) -> list[dict[str, Any]]:
        """What every worker says of its node; waits for all of them, aloud.

        Raises:
            InputError: A worker does not see what it must, or runs other versions than the rest.
            InfeasibleError: The workers did not all start in time.
        """
        probes = {
            actor.perform.remote("probe", (nonce,), None): worker
            for worker, actor in self._actors.items()
        }
        waiting, begun = list(probes), time.monotonic()
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE_SECONDS)
            if waiting and time.monotonic() - begun > START_SECONDS:
                raise InfeasibleError(
                    f"{len(waiting)} of {len(probes)} workers did not start within "
                    f"{START_SECONDS:.0f} s; {self.describe()}"
                )
            if waiting:
                what = f"{len(waiting)} of {len(probes)} workers to start"
                self._announce({"event": "waiting", "for": what, "there": self.describe()})
        try:
            return [ray.get(ref)[0] for ref in probes]
        except RayTaskError as error:
            raise _cause(error) from error

    def start(self, call: Call, record: Any) -> None:
        method = self._actors[call.worker].perform.options(num_returns=2)
        value, emitted = method.remote(call.method, call.arguments, record)
        self._calls[value] = (call, emitted, [record])

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._calls:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        return [self._outcome(ref) for ref in done]

    def _outcome(self, ref: Any) -> Outcome:
        call, emitted, _ = self._calls.pop(ref)
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, ObjectLostError):
                # the chunk went with its node; its file is still there
                return Outcome(call, error=MissingChunk(*(call.takes or (-1, -1))))
            # what is not ours keeps Ray's wrapper, whose text is the traceback on the worker
            is_ours = isinstance(cause, OrchestratorError | MissingChunk)
            return Outcome(call, error=cause if is_ours else error)
        except ObjectLostError as error:
            return Outcome(call, lost=_first(error))
        except _LOST as error:
            return Outcome(call, lost=_first(error))
        return Outcome(call, value, emitted)

    def replace(self, worker: int) -> None:
        with suppress(RayError):
            ray.kill(self._actors[worker])
        del self._actors[worker]
        self._add()

    def describe(self) -> str:
        free, there = ray.available_resources(), ray.cluster_resources()
        return ", ".join(
            f"{free.get(name, 0):g} of {there[name]:g} {name} free"
            for name in ("CPU", "GPU")
            if name in there
        )


def _cause(error: RayTaskError) -> BaseException:
    """What the method raised, as itself; Ray's wrapper carries the remote traceback."""
    cause: BaseException = getattr(error, "cause", None) or error
    return cause


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _words(amounts: dict[str, float]) -> str:
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return " and ".join(
        f"{amount:g} {names.get(name, name)}" for name, amount in amounts.items() if amount
    )
