"""The pool of Ray actors: room, growth, and workers that cannot be used."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from drivers import start, wait_for

from orchestrator.errors import InfeasibleError, InputError, WorkerError
from orchestrator.runtime.scaling import Bounds
from orchestrator.usage import Usage

UNASKED = Bounds()


@pytest.fixture
def make_pool(ray_address):
    """Make pools of workers that need no model."""
    from orchestrator.runtime.ray.pool import RayPool

    class Plain:
        def __init__(self, task):
            self.other = task
            if task == "broken":
                raise ValueError("no such thing")

        def release(self):
            Path(self.other).unlink(missing_ok=True)

        def probe(self, nonce):
            environment = {"torch": "2.12.1" if os.path.exists(self.other) else "2.13.0"}
            return {"environment": environment, "node": "here", "pid": os.getpid()}

        def measured(self, command, record):
            value = None if record is None else int(record["x"].sum())
            return value, None, Usage(host=1)

    def make(task, bounds=UNASKED, max_workers=1, cpus=1, announce=lambda event: None):
        resources = {"num_cpus": cpus, "num_gpus": 0}
        options = {"nonce": "n", "resources": resources, "threads": 1, "announce": announce}
        return RayPool(Plain, task, bounds=bounds, max_workers=max_workers, **options)

    return make


@pytest.mark.ray
def test_workers_turn_to_another_task_where_they_are(make_pool, tmp_path):
    """Reassigned workers keep process and number and release the previous task; a dead one is
    replaced. A task with which no worker can start is an error."""
    events, first = [], tmp_path / "first"
    with make_pool(str(first), Bounds(2, 2), max_workers=2, announce=events.append) as pool:
        first.touch()
        pids = [probe["pid"] for probe in pool.gather()]
        assert {probe["environment"]["torch"] for probe in pool._probes.values()} == {"2.12.1"}
        kept, lost = pool.workers()
        os.kill(pool.workers()[lost].pid, signal.SIGKILL)
        pool.reassign(pool._worker_class, "fine")
        again = pool.gather()
        assert {probe["environment"]["torch"] for probe in again} == {"2.13.0"}
        assert not first.exists()
        assert kept in pool.workers()
        assert lost not in pool.workers()
        assert pool.workers()[kept].pid in pids
        told = [
            location["pid"] for e in events if e["event"] == "workers" for location in e["workers"]
        ]
        assert sorted(told) == sorted({*pids, *(probe["pid"] for probe in again)})
        assert [e["event"] for e in events if e["event"] != "workers"] == ["retired"]
        pool.reassign(pool._worker_class, "broken")
        with pytest.raises(WorkerError, match="a worker cannot start: ValueError: no such thing"):
            pool.gather()


@pytest.mark.ray
def test_a_worker_that_cannot_start_is_an_error(make_pool):
    """The error of its constructor ends the start at once, with one line."""
    with make_pool("broken") as pool, pytest.raises(WorkerError) as raised:
        pool.gather()
    assert str(raised.value) == "a worker cannot start: ValueError: no such thing"


@pytest.fixture
def half_taken():
    """Occupy half of the cluster's eight CPUs."""
    import ray

    class Other:
        def is_there(self):
            return True

    other = ray.remote(num_cpus=4)(Other).remote()
    ray.get(other.is_there.remote())
    yield
    ray.kill(other)


@pytest.mark.ray
def test_workers_without_room_are_not_waited_for(make_pool):
    """The run begins with the workers that fit; the others join when there is room."""
    with make_pool("fine", Bounds(1, 3, is_growing=True), max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == 2
        assert len(pool._actors) == 3
        first, second = pool.workers()
        pool.replace(first)
        assert list(pool.workers()) == [second]
        assert wait_for(lambda: not pool.wait(0.1) and len(pool.workers()) == 2)


@pytest.mark.ray
def test_the_room_there_is_is_taken_and_kept(make_pool):
    """Without bounds only as many actors are created as fit, and none is given back."""
    with make_pool("fine", max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == len(pool._actors) == 2
        assert pool.scale(9) == pool.scale(1) == 0
        assert len(pool._actors) == 2


@pytest.mark.ray
def test_what_others_hold_is_no_room(make_pool, half_taken, monkeypatch):
    """No actor is created that would have to wait for resources of others or request a node."""
    monkeypatch.setattr("orchestrator.runtime.ray.actors.PATIENCE_SECONDS", 1.0)
    with make_pool("fine", max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == 1
        assert wait_for(lambda: not pool.wait(0.1) and pool.nodes.free == 0)
        pool.scale(9)
        assert len(pool._actors) == 1


@pytest.mark.ray
def test_who_grows_gives_back(make_pool, monkeypatch):
    """A growing pool requests more than fit, gives back idle workers, and grows again on demand."""
    monkeypatch.setattr("orchestrator.runtime.scaling.IDLE_SECONDS", 0.5)
    with make_pool("fine", Bounds(1, 3, is_growing=True), max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == 2
        assert len(pool._actors) == 3
        assert pool.scale(1) == 1
        assert len(pool._actors) == 3, "it may be wanted in a moment"
        assert wait_for(lambda: pool.scale(1) == 1 and not pool._joining)
        pool.give_back(next(iter(pool.workers())))
        assert pool.scale(1) == 0
        assert len(pool._actors) == 1
        assert pool.scale(2) == 0
        assert wait_for(lambda: not pool.wait(0.1) and len(pool.workers()) == 2)


@pytest.mark.ray
def test_a_late_worker_of_another_kind_is_not_used(make_pool, tmp_path):
    """An unlike worker that joins late is dropped with a note, and the run continues."""
    other, events = tmp_path / "other", []
    bounds = Bounds(1, 2, is_growing=True)
    with make_pool(str(other), bounds, max_workers=1, announce=events.append) as pool:
        pool.gather()
        other.touch()
        pool.scale(2)
        assert wait_for(lambda: not pool.wait(0.1) and any(e["event"] == "note" for e in events))
        assert len(pool.workers()) == len(pool._actors) == 1
        assert not pool.nodes.quarantined(), "another worker is of use there"
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert note.startswith("a late worker is not used: ")
    assert "2.12.1" in note


@pytest.mark.ray
def test_when_nobody_is_left_a_useless_worker_ends_the_run(make_pool, tmp_path):
    """Without any other worker, an unlike one ends the run with its error."""
    other = tmp_path / "other"
    with make_pool(str(other)) as pool:
        pool.gather()
        other.touch()
        pool.replace(next(iter(pool.workers())))
        with pytest.raises(InputError, match=r"2\.12\.1"):
            wait_for(lambda: pool.wait(0.1))


@pytest.mark.ray
def test_too_few_workers_in_time_is_infeasible(make_pool, half_taken, monkeypatch):
    """The error and the waiting event count the workers and free CPUs."""
    monkeypatch.setattr("orchestrator.runtime.ray.actors.PATIENCE_SECONDS", 2.0)
    there = "1 worker, 0 of 8 CPU free"
    events = []

    def announce(event):
        events.append(event)
        if event["event"] == "waiting" and event["there"] == there:
            # the first has started, however long that took: the time is over
            monkeypatch.setattr("orchestrator.runtime.ray.actors.START_SECONDS", 0.0)

    pool = make_pool("fine", Bounds(2, 2), max_workers=2, cpus=4, announce=announce)
    says = f"1 of 2 workers started within 0 s; {there}"
    with pool, pytest.raises(InfeasibleError, match=says):
        pool.gather()
    assert {"event": "waiting", "for": "1 of 2 workers to start", "there": there} in events


@pytest.mark.ray
def test_a_chunk_that_went_with_its_node_is_read_from_its_file(make_pool):
    """The call is repeated on the same worker, which reads the chunk from its file."""
    import ray

    from orchestrator.runtime.calls import Call, Step

    class Owner:
        def make(self):
            return [ray.put({"x": np.ones(10**6)})]

    with make_pool("fine") as pool:
        pool.gather()
        (worker,) = pool.workers()
        call = Call(worker, Step(0), "blocks 2-3, chunk 0", 1, takes=(2, 0))
        for is_lost in (False, True):
            owner = ray.remote(Owner).remote()
            (record,) = ray.get(owner.make.remote())
            if is_lost:
                ray.kill(owner)
                assert wait_for(lambda ref=record: not is_readable(ray, ref))
            pool.start(call, record)
            outcomes, end = [], time.monotonic() + 10
            while not outcomes and time.monotonic() < end:
                outcomes = pool.wait(0.5)
            assert [outcome.value for outcome in outcomes] == [None if is_lost else 10**6]
            assert list(pool.workers()) == [worker]


def is_readable(ray, ref):
    try:
        ray.get(ref)
    except ray.exceptions.ObjectLostError:
        return False
    return True


AWAIT = """
import sys
import ray
from orchestrator.runtime.ray.cluster import await_node
ray.init(sys.argv[1], log_to_driver=False)
for _ in range(300):
    await_node(1, print)
"""


@pytest.mark.ray
def test_a_node_that_is_there_is_awaited_without_harm(ray_address):
    """The awaited task has just ended each time, and is not cancelled: Ray would sometimes abort
    the driver then."""
    process = start("-c", AWAIT, ray_address)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert output == ""


LOSS = """
import os, signal, sys, time
import ray
from orchestrator.runtime.ray.cluster import connect
connect(sys.argv[1], lambda text: None)

@ray.remote(max_restarts=0, num_cpus=0)
class Actor:
    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)

try:
    ray.get(Actor.remote().end.remote())
except ray.exceptions.ActorDiedError:
    time.sleep(1)
"""


@pytest.mark.ray
def test_ray_prints_nothing_about_a_lost_actor(ray_address):
    """A loss is an event of ours; stdout, where the result goes, has no paragraph of a raylet."""
    process = start("-c", LOSS, ray_address)
    output, error = process.communicate()
    assert (process.returncode, output, error) == (0, "", "")
