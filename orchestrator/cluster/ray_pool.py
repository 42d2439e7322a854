"""Workers as Ray actors, each pinned to one GPU, or to a share of the CPUs where there are none."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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

from orchestrator.cluster.pool import PATIENCE_SECONDS, Outcome
from orchestrator.cluster.ray_cluster import last_line
from orchestrator.cluster.schedule import Call
from orchestrator.cluster.worker import check_alike
from orchestrator.errors import InfeasibleError, OrchestratorError, WorkerError
from orchestrator.store.chunks import MissingChunk

START_SECONDS = 120.0
FAILED_STARTS = 3
_LOST = (ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError)

Announce = Callable[[dict[str, Any]], None]


class RayPool:
    """Equal actors; a lost one is replaced, never restarted, because its memory is gone anyway.

    Actors have `max_restarts=0` and calls no retries: what to repeat, and where, is the dispatch
    loop's decision. An actor counts as a worker once it has started and proved itself, so calls
    wait for no actor that the cluster has no room for. Use as a context manager; leaving it kills
    the actors.

    Args:
        nonce: What the workers' probe looks for; their directories must hold it all the time.
        announce: Told of waits, and of workers that came later.
    """

    def __init__(
        self,
        worker_class: type,
        task: Any,
        *,
        nonce: str,
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
        self._nonce = nonce
        self._announce = announce
        self._count = self._failed_starts = 0
        self._actors: dict[int, Any] = {}
        self._joining: dict[Any, int] = {}
        self._probes: dict[int, dict[str, Any]] = {}
        self._first: dict[str, Any] | None = None
        self._calls: dict[Any, tuple[Call, Any, Any]] = {}
        for _ in range(workers):
            self._add()

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)
        self._actors, self._probes, self._joining, self._calls = {}, {}, {}, {}

    def _add(self) -> None:
        actor = self._actors[self._count] = self._actor_class.remote(self._task)
        probe, _ = actor.perform.options(num_returns=2).remote("probe", (self._nonce,), None)
        self._joining[probe] = self._count
        self._count += 1

    def workers(self) -> Sequence[int]:
        return list(self._probes)

    def gather(self, least: int) -> list[dict[str, Any]]:
        """Waits for the workers to start, aloud; gives what each says of its node.

        When `least` are there, the others are waited for no longer than patience lasts; they join
        when the cluster has room for them.

        Raises:
            InputError: A worker does not see what it must, or runs other versions than the rest.
            InfeasibleError: Fewer started in time.
            WorkerError: They die as they start.
        """
        begun = time.monotonic()
        while self._joining:
            waited, there = time.monotonic() - begun, len(self._probes)
            if there >= least and waited > PATIENCE_SECONDS:
                break
            if waited > START_SECONDS:
                raise InfeasibleError(
                    f"{there} of {least} workers started within {START_SECONDS:.0f} s; "
                    f"{self.describe()}"
                )
            started, _ = ray.wait(list(self._joining), timeout=PATIENCE_SECONDS)
            if not started:
                what = f"{len(self._joining)} of {len(self._actors)} workers to start"
                self._announce({"event": "waiting", "for": what, "there": self.describe()})
            for ref in started:
                self._join(ref)
        return list(self._probes.values())

    def _join(self, ref: Any) -> dict[str, Any] | None:
        """Takes in a worker that has answered its probe, or replaces it if it died over it."""
        worker = self._joining.pop(ref)
        try:
            probe: dict[str, Any] = ray.get(ref)
        except RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, OrchestratorError):
                raise cause from error
            raise WorkerError(f"a worker cannot start: {last_line(error)}") from error
        except _LOST as error:
            self._failed_starts += 1
            if getattr(error, "actor_init_failed", False) or self._failed_starts >= FAILED_STARTS:
                raise WorkerError(f"a worker cannot start: {last_line(error)}") from error
            self.replace(worker)
            return None
        self._first = self._first or probe
        check_alike(probe, self._first)
        self._probes[worker] = probe
        self._failed_starts = 0
        return probe

    def start(self, call: Call, record: Any) -> None:
        method = self._actors[call.worker].perform.options(num_returns=2)
        value, emitted = method.remote(call.method, call.arguments, record)
        self._calls[value] = (call, emitted, record)

    def wait(self, seconds: float) -> list[Outcome]:
        waiting = [*self._calls, *self._joining]
        if not waiting:
            time.sleep(seconds)
            return []
        outcomes = []
        for ref in ray.wait(waiting, num_returns=1, timeout=seconds)[0]:
            if ref in self._calls:
                outcomes += self._outcome(ref)
            elif (probe := self._join(ref)) is not None:
                came = {"node": probe["node"], "pid": probe["pid"]}
                self._announce({"event": "workers", "workers": [came]})
        return outcomes

    def _outcome(self, ref: Any) -> list[Outcome]:
        call, emitted, record = self._calls.pop(ref)
        try:
            return [Outcome(call, ray.get(ref), emitted)]
        except RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, ObjectLostError) and record is not None:
                # the chunk went with its node before the call began; its file is still there
                self.start(call, None)
                return []
            # what is not ours keeps Ray's wrapper, whose text is the traceback on the worker
            is_ours = isinstance(cause, OrchestratorError | MissingChunk)
            return [Outcome(call, error=cause if is_ours else error)]
        except _LOST as error:
            return [Outcome(call, lost=last_line(error))]

    def replace(self, worker: int) -> None:
        with suppress(RayError):
            ray.kill(self._actors[worker])
        del self._actors[worker]
        self._probes.pop(worker, None)
        self._add()

    def describe(self) -> str:
        free, there = ray.available_resources(), ray.cluster_resources()
        amounts = [
            f"{free.get(name, 0):g} of {there[name]:g} {name} free"
            for name in ("CPU", "GPU")
            if name in there
        ]
        return ", ".join([f"{len(self._probes)} workers", *amounts])


def _cause(error: RayTaskError) -> BaseException:
    """What the method raised, as itself; Ray's wrapper carries the remote traceback."""
    cause: BaseException = getattr(error, "cause", None) or error
    return cause
