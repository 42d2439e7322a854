"""Actors of a pool: start, probe, departure and return."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError, RayTaskError

from orchestrator.device.gpu import check_seen
from orchestrator.device.malloc import ARENAS
from orchestrator.device.strict import cuda_environment
from orchestrator.errors import InfeasibleError, OrchestratorError, WorkerError
from orchestrator.readable import counted
from orchestrator.runtime import scaling
from orchestrator.runtime.losses import cause_of_loss
from orchestrator.runtime.pool import PATIENCE_SECONDS, WorkerLocation, describe
from orchestrator.runtime.ray.cluster import WorkerResources, node_of, on_other_nodes
from orchestrator.runtime.ray.nodes import STARTING_POLL_SECONDS, Announce, RayNodes
from orchestrator.runtime.ray.reasons import reason
from orchestrator.runtime.ray.worker_actor import WorkerActor
from orchestrator.runtime.scaling import Bounds, wanted
from orchestrator.runtime.worker import check_alike

START_SECONDS = 120.0
FAILED_STARTS = 3


class RayActors:
    """Equal actors; a lost one is replaced, never restarted, because its memory is lost anyway.

    Actors have `max_restarts=0` and their calls no retries: the dispatch loop decides what is
    repeated, and where. No actor starts on a quarantined node, nor, by Ray's own rule, on a
    draining one. An actor counts as a worker once it has started and answered its probe, so no call
    waits for an actor that the cluster has no room for. A late actor that cannot be used does not
    end the run; its node is quarantined unless others are of use there. Use as a context manager;
    its exit kills the actors.

    To an autoscaler, an actor that was requested and has not started is a demand for a node. Unless
    the bounds grow, actors are requested only where there is room; the replacement of a lost actor
    is requested in any case. Actors end with this process, however it ends, so nothing has to be
    cleaned up later.

    Args:
        nonce: Name of the probe files; the task's directories must hold them as long as the pool
            exists.
        max_workers: Workers that the work can use, until a schedule says otherwise.
        announce: Called with events: waits, and workers that came later.
    """

    def __init__(
        self,
        worker_class: type,
        task: Any,
        *,
        nonce: str,
        bounds: Bounds,
        max_workers: int,
        resources: WorkerResources,
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
            **resources,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables},
        )(WorkerActor)
        self._worker_class = worker_class
        self._bounds, self._max_workers = bounds, max_workers
        self.nodes = RayNodes(resources, announce, is_growing=bounds.is_growing)
        self._task = ray.put(task)
        self._nonce = nonce
        self._announce = announce
        self._count = self._failed_starts = self._refused = 0
        self._is_gathered = False
        self._actors: dict[int, Any] = {}
        self._locations: dict[int, WorkerLocation] = {}
        self._announced: set[int] = set()
        self._joining: dict[Any, int] = {}
        self._probes: dict[int, dict[str, Any]] = {}
        self._first: dict[str, Any] | None = None
        self._too_many_since: float | None = None
        self.scale(max_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors.values():
            with suppress(RayError):
                ray.kill(actor)
        self._actors, self._probes, self._joining, self._locations = {}, {}, {}, {}

    def _add(self) -> None:
        where = on_other_nodes(self.nodes.excluded_ids)
        self._actors[self._count] = self._actor_class.options(**where).remote()
        self._assign(self._count)
        self._count += 1

    def _assign(self, worker: int) -> None:
        """Give an actor the task; it joins when it answers the probe."""
        becomes = self._actors[worker].become
        self._joining[becomes.remote(self._worker_class, self._task, self._nonce)] = worker

    def reassign(self, worker_class: type, task: Any) -> None:
        """Give all workers another task, in their processes; call `gather` next."""
        self._worker_class, self._task = worker_class, ray.put(task)
        self._first, self._is_gathered = None, False
        self.nodes.is_starting = True
        self._probes, self._joining = {}, {}
        for worker in self._actors:
            self._assign(worker)

    def workers(self) -> Mapping[int, WorkerLocation]:
        return {worker: self._locations[worker] for worker in self._probes}

    def gather(self) -> list[dict[str, Any]]:
        """Wait for the workers to start, with messages about the wait. Returns their probes.

        Once the minimum has started, the others for which there was room are awaited for
        `PATIENCE_SECONDS` at most; later ones join during the run. A growing pool waits for its
        minimum without a limit.

        Raises:
            InputError: A worker does not see the run's files or its GPU, or runs other versions
                than the rest.
            InfeasibleError: Fewer than the minimum started in time.
            WorkerError: Workers die at their start.
        """
        begun = spoke = time.monotonic()
        least = self._bounds.least
        fitting = min(self._bounds.within(self._max_workers), self.nodes.room())
        while True:
            self.scale(self._max_workers)
            waited = time.monotonic() - begun
            there = len(self._probes) - len(self._leaving())
            if there >= least and (there >= fitting or waited > PATIENCE_SECONDS):
                break
            if waited > START_SECONDS and not self._bounds.is_growing:
                raise InfeasibleError(
                    f"{there} of {counted(least, 'worker')} started within {START_SECONDS:.0f} s; "
                    f"{describe(len(self._probes), self.nodes)}"
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
                wanted_now = max(least, fitting)
                what = f"{wanted_now - there} of {counted(wanted_now, 'worker')} to start"
                self._announce(
                    {
                        "event": "waiting",
                        "for": what,
                        "there": describe(len(self._probes), self.nodes),
                    }
                )
        self._is_gathered = True
        self.nodes.is_starting = False
        self._announce_new(list(self._probes))
        return list(self._probes.values())

    def _announce_new(self, workers: Sequence[int]) -> None:
        """Announce workers that have not been announced yet."""
        new = [worker for worker in workers if worker not in self._announced]
        self._announced.update(new)
        if new:
            locations = [asdict(self._locations[worker]) for worker in new]
            self._announce({"event": "workers", "workers": locations})

    def _join(self, ref: Any) -> dict[str, Any] | None:
        """Add a worker that has answered its probe; replace it if it died meanwhile."""
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
                # a GPU failure at the start counts as the death of its worker
                self._start_failed(worker, error, is_final=cause_of_loss(raised) is None)
            return None
        except RayError as error:
            is_final = getattr(error, "actor_init_failed", False)
            self._start_failed(worker, error, is_final=is_final)
            return None
        except OrchestratorError as error:
            self._refuse(worker, error)
            return None
        if self.nodes.is_quarantined(probe["node_id"]):
            # it was requested before the node was quarantined
            self.replace(worker)
            return None
        self._probes[worker] = probe
        name = self.nodes.name(probe["node_id"])
        self._locations[worker] = WorkerLocation(name, probe["pid"])
        self._failed_starts = 0
        return probe

    def _start_failed(self, worker: int, error: RayError, *, is_final: bool) -> None:
        """Replace a worker that was lost at its start, unless the next would be lost as well."""
        self._failed_starts += not is_node_loss(error)
        if is_final or self._failed_starts >= FAILED_STARTS:
            said = reason(error)
            # a package that the driver has, such as one that adds a method
            missing = "; install it on every node" if "ModuleNotFoundError" in said else ""
            self._refuse(worker, WorkerError(f"a worker cannot start: {said}{missing}"))
            return
        if worker in self._announced:
            self._announce({"event": "retired", **asdict(self._locations[worker])})
        self.replace(worker)

    def _refuse(self, worker: int, error: BaseException) -> None:
        """Raise the error that makes a worker unusable, unless the run has other workers.

        The worker is then dropped, and its node quarantined unless others are of use there.
        """
        if not self._is_gathered or not self._probes:
            raise error
        self._refused += 1
        node = node_of(self._actors[worker])
        if node is not None and all(each["node_id"] != node for each in self._probes.values()):
            self.nodes.quarantine(self.nodes.name(node))
        self._announce({"event": "note", "text": f"a late worker is not used: {error}"})
        self.give_back(worker)

    def replace(self, worker: int) -> None:
        self.give_back(worker)
        self._add()

    def scale(self, max_workers: int) -> int:
        self._max_workers = max_workers
        self.nodes.poll()
        leaving = self._leaving()
        staying = len(self._actors) - len(leaving)
        count = wanted(self._bounds, max_workers, staying + self.nodes.free)
        if self._refused < FAILED_STARTS:
            for _ in range(staying, count):
                self._add()
                self.nodes.free = max(0, self.nodes.free - 1)
        self._withdraw(staying - count)
        return max(0, len(self._probes) - len(leaving) - count) if self._bounds.is_growing else 0

    def _withdraw(self, spare: int) -> None:
        """Withdraw requests for actors that have been surplus for `IDLE_SECONDS`."""
        now = time.monotonic()
        if spare <= 0 or self._too_many_since is None:
            self._too_many_since = now if spare > 0 else None
        elif now - self._too_many_since > scaling.IDLE_SECONDS:
            # the most recent requests are served last
            for worker in list(self._joining.values())[::-1][:spare]:
                self.give_back(worker)

    def give_back(self, worker: int) -> None:
        with suppress(RayError):
            ray.kill(self._actors[worker])
        del self._actors[worker]
        self._probes.pop(worker, None)
        self._locations.pop(worker, None)
        self._announced.discard(worker)
        self._joining = {ref: each for ref, each in self._joining.items() if each != worker}

    def _leaving(self) -> list[int]:
        """Workers on nodes that are draining or quarantined."""
        self.nodes.poll()
        return [
            worker
            for worker, probe in self._probes.items()
            if not self.nodes.stays(probe["node_id"])
        ]


def is_node_loss(error: RayError) -> bool:
    """True if an actor was lost with its node, or its node cannot be reached."""
    if isinstance(error, ActorUnavailableError | ObjectLostError):
        return True
    return getattr(error, "preempted", False) or "its node has died" in str(error)


def remote_cause(error: RayTaskError) -> BaseException:
    """Exception of the remote method itself; Ray's wrapper carries the remote traceback."""
    cause: BaseException = getattr(error, "cause", None) or error
    return cause
