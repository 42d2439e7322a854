"""Actors that are asked for, start, prove themselves, leave and are given back."""

import os
import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError, RayTaskError

from orchestrator.device.gpu import check_seen
from orchestrator.device.malloc import ARENAS
from orchestrator.device.strict import cuda_environment
from orchestrator.errors import InfeasibleError, OrchestratorError, WorkerError
from orchestrator.runtime import scaling
from orchestrator.runtime.losses import cause_of_loss
from orchestrator.runtime.pool import PATIENCE_SECONDS, WorkerLocation
from orchestrator.runtime.ray.cluster import (
    Share,
    draining_nodes,
    free_room,
    last_line,
    node_names,
    node_of,
    on_other_nodes,
    total_room,
)
from orchestrator.runtime.ray.worker_actor import WorkerActor
from orchestrator.runtime.scaling import Bounds, wanted
from orchestrator.runtime.worker import check_alike

START_SECONDS = 120.0
FAILED_STARTS = 3
POLL_SECONDS = 2.0
"""How often Ray is asked which nodes there are; it takes it a few milliseconds."""
STARTING_POLL_SECONDS = 0.5

Announce = Callable[[dict[str, Any]], None]


class RayActors:
    """Equal actors; a lost one is replaced, never restarted, because its memory is gone anyway.

    Actors have `max_restarts=0` and calls no retries: what to repeat, and where, is the dispatch
    loop's decision. No actor starts on a node that is quarantined, nor, which is Ray's own rule, on
    one that is draining. An actor counts as a worker once it has started and proved itself, so
    calls wait for no actor that the cluster has no room for. One that comes late and cannot be used
    ends no run; its node is left alone. Use as a context manager; leaving it kills the actors.

    To an autoscaler an actor that was asked for and has not come is a demand for a node. Unless the
    bounds grow, actors are asked for only where there is room; but for one that was lost another is
    asked for in any case. They go with this process, however that ends, so nothing is ever left to
    be taken back.

    Args:
        nonce: What the workers' probe looks for; their directories must hold it all the time.
        max_workers: Workers that the work can use, before a schedule says so.
        announce: Told of waits, and of workers that came later.
    """

    def __init__(
        self,
        worker_class: type,
        task: Any,
        *,
        nonce: str,
        bounds: Bounds,
        max_workers: int,
        share: Share,
        threads: int,
        announce: Announce,
    ) -> None:
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            **ARENAS,
            **cuda_environment(os.environ),
        }
        self._actor_class = ray.remote(
            **share,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables},
        )(WorkerActor)
        self._worker_class = worker_class
        self._bounds, self._share, self._max_workers = bounds, share, max_workers
        self._task = ray.put(task)
        self._nonce = nonce
        self._announce = announce
        self._count = self._failed_starts = self._refused = 0
        self._is_gathered = False
        self._actors: dict[int, Any] = {}
        self._seats: dict[int, WorkerLocation] = {}
        self._joining: dict[Any, int] = {}
        self._probes: dict[int, dict[str, Any]] = {}
        self._first: dict[str, Any] | None = None
        self._names: dict[str, str] = {}
        self._draining: set[str] = set()
        self._quarantined: set[str] = set()
        self._polled = 0.0
        self._free = 0
        self._too_many_since: float | None = None
        self.scale(max_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)
        self._actors, self._probes, self._joining, self._seats = {}, {}, {}, {}

    def _add(self) -> None:
        where = on_other_nodes(self._quarantined)
        self._actors[self._count] = self._actor_class.options(**where).remote()
        self._turn(self._count)
        self._count += 1

    def _turn(self, worker: int) -> None:
        """Has an actor take up the task; it joins once it has."""
        becomes = self._actors[worker].become
        self._joining[becomes.remote(self._worker_class, self._task, self._nonce)] = worker

    def turn_to(self, worker_class: type, task: Any) -> None:
        """Has all workers take up another task, in the processes that they have; then `gather`."""
        self._worker_class, self._task = worker_class, ray.put(task)
        self._first, self._is_gathered = None, False
        self._probes, self._joining = {}, {}
        for worker in self._actors:
            self._turn(worker)

    def workers(self) -> Sequence[int]:
        return list(self._probes)

    def location(self, worker: int) -> WorkerLocation:
        return self._seats[worker]

    def _name(self, node_id: str) -> str:
        if node_id not in self._names:
            self._names |= node_names()
        return self._names[node_id]

    def gather(self) -> list[dict[str, Any]]:
        """Waits for the workers to start, aloud; gives what each says of its node.

        When the fewest that were asked for are there, the others for which there was room are
        waited for no longer than patience lasts; they join later. Who grows waits without end.

        Raises:
            InputError: A worker does not see the run's files or its GPU, or runs other versions
                than the rest.
            InfeasibleError: Fewer started in time.
            WorkerError: They die as they start.
        """
        begun = spoke = time.monotonic()
        least = self._bounds.least
        fitting = min(self._bounds.within(self._max_workers), self._room())
        while True:
            self.scale(self._max_workers)
            waited = time.monotonic() - begun
            there = len(self._probes) - len(self.leaving())
            if there >= least and (there >= fitting or waited > PATIENCE_SECONDS):
                break
            if waited > START_SECONDS and not self._bounds.is_growing:
                raise InfeasibleError(
                    f"{there} of {least} workers started within {START_SECONDS:.0f} s; "
                    f"{self.describe()}"
                )
            started: list[Any] = []
            if self._joining:
                started, _ = ray.wait(list(self._joining), timeout=STARTING_POLL_SECONDS)
            else:
                time.sleep(STARTING_POLL_SECONDS)
            for ref in started:
                self._join(ref)
            if started:
                spoke = time.monotonic()
            elif time.monotonic() - spoke > PATIENCE_SECONDS:
                spoke = time.monotonic()
                what = f"{max(least, fitting) - there} of {max(least, fitting)} workers to start"
                self._announce({"event": "waiting", "for": what, "there": self.describe()})
        self._is_gathered = True
        self._announce_new(list(self._probes))
        return list(self._probes.values())

    def _announce_new(self, workers: Sequence[int]) -> None:
        """Tells of workers that nobody was told of."""
        new = [worker for worker in workers if worker not in self._seats]
        for worker in new:
            probe = self._probes[worker]
            self._seats[worker] = WorkerLocation(self._name(probe["node_id"]), probe["pid"])
        if new:
            seats = [asdict(self._seats[worker]) for worker in new]
            self._announce({"event": "workers", "workers": seats})

    def _join(self, ref: Any) -> dict[str, Any] | None:
        """Takes in a worker that has answered its probe, or replaces it if it died over it."""
        worker = self._joining.pop(ref)
        try:
            probe: dict[str, Any] = ray.get(ref)
            check_seen(probe)
            self._first = self._first or probe
            check_alike(probe, self._first)
        except RayTaskError as error:
            raised = remote_cause(error)
            if isinstance(raised, OrchestratorError):
                self._refuse(worker, raised)
            else:
                # a GPU that fails at the start counts as the death of its worker
                self._start_failed(worker, error, is_final=cause_of_loss(raised) is None)
            return None
        except RayError as error:
            is_final = getattr(error, "actor_init_failed", False)
            self._start_failed(worker, error, is_final=is_final)
            return None
        except OrchestratorError as error:
            self._refuse(worker, error)
            return None
        if probe["node_id"] in self._quarantined:
            # it was on its way there before the node was known to be sick
            self.replace(worker)
            return None
        self._probes[worker] = probe
        self._failed_starts = 0
        return probe

    def _start_failed(self, worker: int, error: RayError, *, is_final: bool) -> None:
        """Replaces a worker that was lost at its start, unless that would happen again."""
        self._failed_starts += not is_node_loss(error)
        if is_final or self._failed_starts >= FAILED_STARTS:
            self._refuse(worker, WorkerError(f"a worker cannot start: {last_line(error)}"))
            return
        if worker in self._seats:
            self._announce({"event": "retired", **asdict(self._seats[worker])})
        self.replace(worker)

    def _refuse(self, worker: int, error: BaseException) -> None:
        """Raises what makes a worker useless; but a run that has others goes on without it.

        Its node is quarantined, unless others are of use there.
        """
        if not self._is_gathered or not self._probes:
            raise error
        self._refused += 1
        node = node_of(self._actors[worker])
        if node is not None and all(each["node_id"] != node for each in self._probes.values()):
            self._quarantined.add(node)
        self._announce({"event": "note", "text": f"a worker that came is not used: {error}"})
        self.give_back(worker)

    def replace(self, worker: int) -> None:
        self.give_back(worker)
        self._add()

    def scale(self, max_workers: int) -> int:
        self._max_workers = max_workers
        self._poll()
        leaving = self.leaving()
        staying = len(self._actors) - len(leaving)
        count = wanted(self._bounds, max_workers, staying + self._free)
        if self._refused < FAILED_STARTS:
            for _ in range(staying, count):
                self._add()
                self._free = max(0, self._free - 1)
        self._withdraw(staying - count)
        return max(0, len(self._probes) - len(leaving) - count) if self._bounds.is_growing else 0

    def _withdraw(self, spare: int) -> None:
        """Asks no more for actors that have been too many for long, and have not come."""
        now = time.monotonic()
        if spare <= 0 or self._too_many_since is None:
            self._too_many_since = now if spare > 0 else None
        elif now - self._too_many_since > scaling.IDLE_SECONDS:
            # the last ones that were asked for are the last to come
            for worker in list(self._joining.values())[::-1][:spare]:
                self.give_back(worker)

    def give_back(self, worker: int) -> None:
        with suppress(RayError):
            ray.kill(self._actors[worker])
        del self._actors[worker]
        self._probes.pop(worker, None)
        self._seats.pop(worker, None)
        self._joining = {ref: each for ref, each in self._joining.items() if each != worker}

    def leaving(self) -> Sequence[int]:
        self._poll()
        going = self._draining | self._quarantined
        return [worker for worker, probe in self._probes.items() if probe["node_id"] in going]

    def _room(self) -> int:
        """Workers that the nodes that are there, and stay, can hold."""
        return sum(room for node, room in total_room(self._share).items() if self._stays(node))

    def _stays(self, node: str) -> bool:
        return node not in self._draining and node not in self._quarantined

    def _poll(self) -> None:
        """Notes what nodes have free, and which are told to go."""
        pause = POLL_SECONDS if self._is_gathered else STARTING_POLL_SECONDS
        if time.monotonic() - self._polled < pause:
            return
        self._polled = time.monotonic()
        for node, deadline in draining_nodes().items():
            if node not in self._draining:
                self._draining.add(node)
                event = {"event": "draining", "node": self._name(node), "deadline": deadline}
                self._announce(event)
        free = free_room(self._share)
        self._free = sum(room for node, room in free.items() if self._stays(node))

    def quarantine(self, node: str) -> None:
        self._quarantined |= {each for each, name in self._names.items() if name == node}

    def nodes(self) -> Set[str]:
        return {self._name(node) for node in total_room(self._share) if self._stays(node)}

    def quarantined(self) -> Set[str]:
        return {self._name(node) for node in self._quarantined}

    def is_growing(self) -> bool:
        return self._bounds.is_growing

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


def is_node_loss(error: RayError) -> bool:
    """Whether an actor is gone because its node is, or has not been reached for a while."""
    if isinstance(error, ActorUnavailableError | ObjectLostError):
        return True
    return getattr(error, "preempted", False) or "its node has died" in str(error)


def remote_cause(error: RayTaskError) -> BaseException:
    """What the method raised, as itself; Ray's wrapper carries the remote traceback."""
    cause: BaseException = getattr(error, "cause", None) or error
    return cause
