"""Workers as Ray actors, each pinned to one GPU, or to a share of the CPUs where there are none."""

import time
from collections.abc import Callable, Sequence, Set
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

from orchestrator.cluster import postmortem
from orchestrator.cluster.policy import Cause
from orchestrator.cluster.pool import PATIENCE_SECONDS, Outcome, Seat, is_out_of_memory
from orchestrator.cluster.ray_cluster import (
    Share,
    draining_nodes,
    last_line,
    node_names,
    on_node,
    on_other_nodes,
    room,
)
from orchestrator.cluster.scaling import Bounds, wanted
from orchestrator.cluster.schedule import Call
from orchestrator.cluster.worker import check_alike
from orchestrator.cluster.worker_actor import WorkerActor
from orchestrator.errors import InfeasibleError, OrchestratorError, WorkerError
from orchestrator.store.chunks import MissingChunk

START_SECONDS = 120.0
FAILED_STARTS = 3
POLL_SECONDS = 2.0
"""How often Ray is asked which nodes there are; it takes it a few milliseconds."""
POSTMORTEM_SECONDS = 10.0
_LOST = (ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError)
_LEAVES_ITS_LOG = (Cause.DIED, Cause.OUT_OF_MEMORY)

Announce = Callable[[dict[str, Any]], None]


class RayPool:
    """Equal actors; a lost one is replaced, never restarted, because its memory is gone anyway.

    Actors have `max_restarts=0` and calls no retries: what to repeat, and where, is the dispatch
    loop's decision. No actor starts on a node that is quarantined, nor, which is Ray's own rule, on
    one that is draining. An actor counts as a worker once it has started and proved itself, so
    calls wait for no actor that the cluster has no room for. Use as a context manager; leaving it
    kills the actors.

    An actor that is asked for and has not come is, to an autoscaler, a demand for a node. It goes
    with this process, however that ends, so nothing is ever left to be taken back.

    Args:
        nonce: What the workers' probe looks for; their directories must hold it all the time.
        usable: Workers that the work can use, before a schedule says so.
        is_shared: Whether idle workers are given back, for what else the cluster has to do.
        announce: Told of waits, and of workers that came later.
    """

    def __init__(
        self,
        worker_class: type,
        task: Any,
        *,
        nonce: str,
        bounds: Bounds,
        usable: int,
        share: Share,
        threads: int,
        is_shared: bool,
        announce: Announce,
    ) -> None:
        variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._actor_class = ray.remote(
            **share,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables},
        )(WorkerActor)
        self._worker_class = worker_class
        self._bounds, self._share, self._is_shared = bounds, share, is_shared
        self._task = ray.put(task)
        self._nonce = nonce
        self._announce = announce
        self._count = self._failed_starts = 0
        self._actors: dict[int, Any] = {}
        self._joining: dict[Any, int] = {}
        self._probes: dict[int, dict[str, Any]] = {}
        self._first: dict[str, Any] | None = None
        self._calls: dict[Any, tuple[Call, Any, Any]] = {}
        self._names: dict[str, str] = {}
        self._draining: set[str] = set()
        self._quarantined: set[str] = set()
        self._silent: set[str] = set()
        self._polled = 0.0
        self._room: dict[str, int] = {}
        self.scale(usable)

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)
        self._actors, self._probes, self._joining, self._calls = {}, {}, {}, {}

    def _add(self) -> None:
        where = on_other_nodes(self._quarantined)
        actor = self._actor_class.options(**where).remote(self._worker_class, self._task)
        self._actors[self._count] = actor
        self._joining[actor.probe.remote(self._nonce)] = self._count
        self._count += 1

    def workers(self) -> Sequence[int]:
        return list(self._probes)

    def seat(self, worker: int) -> Seat:
        probe = self._probes[worker]
        return Seat(self._name(probe["node_id"]), probe["pid"])

    def _name(self, node_id: str) -> str:
        if node_id not in self._names:
            self._names |= node_names()
        return self._names[node_id]

    def gather(self) -> list[dict[str, Any]]:
        """Waits for the workers to start, aloud; gives what each says of its node.

        When the fewest that were asked for are there, the others for which there was room are
        waited for no longer than patience lasts; they join later. Who grows waits without end.

        Raises:
            InputError: A worker does not see what it must, or runs other versions than the rest.
            InfeasibleError: Fewer started in time.
            WorkerError: They die as they start.
        """
        begun = spoke = time.monotonic()
        least, room = self._bounds.least, self._total_room()
        while self._joining:
            waited, there = time.monotonic() - begun, len(self._probes)
            if there >= least and (there >= room or waited > PATIENCE_SECONDS):
                break
            if waited > START_SECONDS and not self._bounds.is_growing:
                raise InfeasibleError(
                    f"{there} of {least} workers started within {START_SECONDS:.0f} s; "
                    f"{self.describe()}"
                )
            started, _ = ray.wait(list(self._joining), timeout=POLL_SECONDS)
            for ref in started:
                self._join(ref)
            if started:
                spoke = time.monotonic()
            elif time.monotonic() - spoke > PATIENCE_SECONDS:
                spoke = time.monotonic()
                what = f"{len(self._joining)} of {len(self._actors)} workers to start"
                self._announce({"event": "waiting", "for": what, "there": self.describe()})
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
            self._failed_starts += not _is_node_loss(error)
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
        # references are looked up where they are arguments themselves, not in a list
        records = record if isinstance(record, list) else [record]
        value, emitted = method.remote(call.method, call.arguments, *records)
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
                came = {"node": self._name(probe["node_id"]), "pid": probe["pid"]}
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
            if is_out_of_memory(cause):
                why = f"{type(cause).__name__}: {cause}"
                return [Outcome(call, lost=why, cause=Cause.OUT_OF_MEMORY, log=str(error))]
            # what is not ours keeps Ray's wrapper, whose text is the traceback on the worker
            is_ours = isinstance(cause, OrchestratorError | MissingChunk)
            return [Outcome(call, error=cause if is_ours else error, log=str(error))]
        except _LOST as error:
            cause_of_loss = self._cause_of_loss(call.worker, error)
            log = self._log(call.worker) if cause_of_loss in _LEAVES_ITS_LOG else str(error)
            return [Outcome(call, lost=last_line(error), cause=cause_of_loss, log=log)]

    def _cause_of_loss(self, worker: int, error: RayError) -> Cause:
        node = self._probes[worker]["node_id"]
        if isinstance(error, OutOfMemoryError):
            return Cause.OUT_OF_MEMORY
        if node in self._draining or getattr(error, "preempted", False):
            return Cause.PREEMPTED
        return Cause.NODE_LOST if _is_node_loss(error) else Cause.DIED

    def _log(self, worker: int) -> str:
        return self._on_its_node(worker, postmortem.tail, self._probes[worker]["log"])

    def _on_its_node(self, worker: int, function: Callable[..., str], *arguments: Any) -> str:
        """What a function says of a worker's process where that is, or why it cannot."""
        node = self._probes[worker]["node_id"]
        if node == ray.get_runtime_context().get_node_id():
            return function(*arguments)
        if node in self._silent:
            return f"node {self._name(node)} has not answered before"
        task = ray.remote(num_cpus=0, max_retries=0)(function).options(**on_node(node))
        ref = task.remote(*arguments)
        try:
            said: str = ray.get(ref, timeout=POSTMORTEM_SECONDS)
        except RayError as error:
            ray.cancel(ref, force=True)
            self._silent.add(node)
            return f"node {self._name(node)} does not say more: {last_line(error)}"
        return said

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        (ref,) = (ref for ref, (each, _, _) in self._calls.items() if each is call)
        if ray.wait([ref], timeout=0)[0]:
            # it has answered while others were listened to
            return self._outcome(ref)
        del self._calls[ref]
        probe = self._probes[call.worker]
        log = self._on_its_node(call.worker, postmortem.end_hung, probe["pid"], probe["log"])
        return [Outcome(call, lost=why, cause=Cause.HUNG, log=log)]

    def replace(self, worker: int) -> None:
        self.give_back(worker)
        self._add()

    def scale(self, usable: int) -> int:
        self._poll()
        count = wanted(self._bounds, usable, self._total_room())
        staying = len(self._actors) - len(self.leaving())
        for _ in range(staying, count):
            self._add()
        # the last ones that were asked for are the last to come
        for ref in list(self._joining)[::-1][: max(0, staying - count)]:
            self.give_back(self._joining[ref])
        return max(0, len(self._probes) - count) if self._is_shared else 0

    def give_back(self, worker: int) -> None:
        with suppress(RayError):
            ray.kill(self._actors[worker])
        del self._actors[worker]
        self._probes.pop(worker, None)
        self._joining = {ref: each for ref, each in self._joining.items() if each != worker}

    def leaving(self) -> Sequence[int]:
        self._poll()
        going = self._draining | self._quarantined
        return [worker for worker, probe in self._probes.items() if probe["node_id"] in going]

    def _total_room(self) -> int:
        """Workers that the nodes that are there, and stay, can hold."""
        going = self._draining | self._quarantined
        return sum(workers for node, workers in self._room.items() if node not in going)

    def _poll(self) -> None:
        """Notes what nodes there are, and which are told to go."""
        if time.monotonic() - self._polled < POLL_SECONDS:
            return
        self._polled = time.monotonic()
        self._room = room(self._share)
        for node, deadline in draining_nodes().items():
            if node not in self._draining:
                self._draining.add(node)
                event = {"event": "draining", "node": self._name(node), "deadline": deadline}
                self._announce(event)

    def quarantine(self, node: str) -> None:
        self._quarantined |= {each for each, name in self._names.items() if name == node}

    def nodes(self) -> Set[str]:
        fit = room(self._share).keys() - self._draining - self._quarantined
        return {self._name(node) for node in fit}

    def quarantined(self) -> Set[str]:
        return {self._name(node) for node in self._quarantined}

    def describe(self) -> str:
        free, there = ray.available_resources(), ray.cluster_resources()
        amounts = [
            f"{free.get(name, 0):g} of {there[name]:g} {name} free"
            for name in ("CPU", "GPU")
            if name in there
        ]
        going = [f"{self._name(node)} is draining" for node in sorted(self._draining)]
        going += [f"{name} is quarantined" for name in sorted(self.quarantined())]
        return ", ".join([f"{len(self._probes)} workers", *amounts, *going])


def _is_node_loss(error: RayError) -> bool:
    """Whether an actor is gone because its node is, or has not been reached for a while."""
    if isinstance(error, ActorUnavailableError | ObjectLostError):
        return True
    return getattr(error, "preempted", False) or "its node has died" in str(error)


def _cause(error: RayTaskError) -> BaseException:
    """What the method raised, as itself; Ray's wrapper carries the remote traceback."""
    cause: BaseException = getattr(error, "cause", None) or error
    return cause
