"""Workers that hang, units that kill, nodes that are sick or go: the same bytes, or a clear error.

The faults are real: processes stop, hold the interpreter, kill themselves; nodes are drained and
killed. What fails is a worker that does so where a test tells it to.
"""

import ctypes
import os
import signal
import sys

import pytest
import seen
import torch
from benchmarks.common.nodes import Nodes
from drivers import is_unit, units
from pipeline import contents, run, write_llama, write_text
from seen import Once, Seen, records, wait_until_there_are

from orchestrator.device.gpu import PRETENDED
from orchestrator.errors import InfeasibleError, InputError, WorkerError
from orchestrator.runtime.calls import Finish, Open
from orchestrator.runtime.deadline import VARIABLE
from orchestrator.stages import driver
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.store.run import RunDirectory

pytestmark = pytest.mark.chaos
SPREAD = {"executor": "ray", "workers": 4, "shards": 5}
"""As many workers as two nodes hold: a lost one is replaced on its node."""
ELSEWHERE = SPREAD | {"workers": 3}
"""With room for one more: a lost worker is replaced on either node."""
PAIR = SPREAD | {"workers": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense")


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Files of an undisturbed run in one process."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(llama, out, text)
    return contents(out)


@pytest.fixture(scope="module")
def nodes(ray_address):
    from ray import cloudpickle

    # workers can import neither module, and execute their functions
    sent = [sys.modules[__name__], seen]
    for module in sent:
        cloudpickle.register_pickle_by_value(module)
    nodes = Nodes(ray_address)
    yield nodes
    nodes.close()
    for module in sent:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def inject(monkeypatch):
    """Makes every worker suffer a fault, a function of its command, before a call."""

    def inject(fault):
        class FaultyWorker(CompressionWorker):
            def perform(self, command, record):
                fault(command)
                return super().perform(command, record)

        monkeypatch.setattr(driver, "CompressionWorker", FaultyWorker)

    return inject


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(10_000)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


HANGS = {
    "holding the interpreter": (hold_the_interpreter, "in hold_the_interpreter"),
    "stopped": (stop, "the process was T (stopped)"),
}


@pytest.mark.ray
@pytest.mark.parametrize("how", HANGS)
def test_a_worker_that_hangs_is_replaced(
    how, llama, text, reference, tmp_path, nodes, inject, monkeypatch
):
    """After its deadline it is killed, and what it was doing then is on record."""
    # long enough for the first call of a worker that shares its core with other tests
    monkeypatch.setenv(VARIABLE, "40")
    hang, found = HANGS[how]
    once = Once(tmp_path / "once")

    def fault(command):
        if command == Finish(5) and once():
            hang()

    nodes.fill(1)
    inject(fault)
    seen = Seen()
    run(llama, tmp_path / "out", text, on_event=seen, **PAIR)
    assert contents(tmp_path / "out") == reference
    (lost,) = seen.named("lost")
    assert (lost["unit"], lost["cause"], lost["decided"]) == ("block 5, finish", "hung", "repeat")
    assert lost["record"] == "failures/0001.json"
    (record,) = records(tmp_path / "out.run")
    assert found in record["log"]
    assert "at most 40 s are allowed" in record["why"]
    assert RunDirectory(tmp_path / "out.run").status()["failures"] == 1
    assert seen.all_are_gone()


@pytest.mark.ray
def test_a_unit_that_kills_its_workers_is_named(
    llama, text, reference, tmp_path, nodes, inject, monkeypatch
):
    """On a second node it is known to be the cause; what others have done is not done again."""
    # a process that reads the log starts on the node, beside other tests
    monkeypatch.setattr("orchestrator.runtime.ray.pool.POSTMORTEM_SECONDS", 60.0)

    def fault(command):
        if command == Finish(6):
            # the tokens are a unit too
            wait_until_there_are(5, tmp_path / "out.run" / "units", "manifest.json")
            os.write(2, b"last words\n")
            die()

    nodes.fill(2)
    inject(fault)
    seen = Seen()
    with pytest.raises(WorkerError, match=r"^block 6, finish: its worker died on .* and died on"):
        run(llama, tmp_path / "out", text, on_event=seen, **ELSEWHERE)
    assert {lost["unit"] for lost in seen.named("lost")} == {"block 6, finish"}
    last = records(tmp_path / "out.run")[-1]
    assert last["decided"] == "end the run"
    assert last["log"].rstrip().endswith("last words")
    assert last["log"].startswith("The actor died unexpectedly before finishing this task.")
    assert last["why"] == "its process was killed (by the kernel, if memory ran out) or has crashed"
    assert RunDirectory(tmp_path / "out.run").status()["state"] == "failed"
    assert seen.all_are_gone()
    monkeypatch.undo()
    # those that nobody was told of, as the run ended, and without the tokens
    committed = sum(1 for _ in (tmp_path / "out.run" / "units").rglob("manifest.json")) - 1
    again = Seen()
    run(llama, tmp_path / "out", text, on_event=again)
    assert units(again.events) == 10 - committed
    assert units(seen.events) >= 4
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
def test_a_sick_node_is_quarantined(llama, text, reference, tmp_path, nodes, inject):
    """Three units fail on it and elsewhere do not: all is done elsewhere, and nobody is left."""
    sick, well = nodes.fill(2)

    def fault(command):
        import ray

        if not isinstance(command, Finish):
            return
        if ray.get_runtime_context().get_node_id() == sick:
            die()
        wait_until_there_are(3, tmp_path / "out.run", "failures/*.json")

    inject(fault)
    seen = Seen()
    run(llama, tmp_path / "out", text, on_event=seen, **SPREAD)
    assert contents(tmp_path / "out") == reference
    (quarantined,) = seen.named("quarantined")
    assert sick[:8] in quarantined["node"]
    assert all(sick[:8] in lost["node"] for lost in seen.named("lost"))
    after = seen.events[seen.events.index(quarantined) :]
    came = [worker for event in after if event["event"] == "workers" for worker in event["workers"]]
    assert all(well[:8] in worker["node"] for worker in came)
    assert seen.all_are_gone()


@pytest.mark.ray
def test_a_drained_node_costs_nothing(llama, text, reference, tmp_path, nodes, monkeypatch):
    """Its workers end their calls and are replaced elsewhere; nothing counts as a failure."""
    # so small a run may end within the two seconds between looks
    monkeypatch.setattr("orchestrator.runtime.ray.nodes.POLL_SECONDS", 0.1)
    going, staying = nodes.fill(2)

    def drain(event):
        if is_unit(2)(event):
            nodes.drain(going, seconds=60)

    seen = Seen(drain)
    run(llama, tmp_path / "out", text, on_event=seen, **ELSEWHERE)
    assert contents(tmp_path / "out") == reference
    (draining,) = seen.named("draining")
    assert going[:8] in draining["node"]
    assert draining["deadline"] > 0
    after = seen.events[seen.events.index(draining) :]
    came = [worker for event in after if event["event"] == "workers" for worker in event["workers"]]
    assert all(staying[:8] in worker["node"] for worker in came)
    assert not seen.named("lost")
    assert seen.all_are_gone()
    nodes.kill(going)


@pytest.mark.ray
def test_a_killed_node_changes_no_byte(llama, text, reference, tmp_path, nodes):
    """Its workers' calls are made on the other node, once it is known to be gone."""
    killed, _ = nodes.fill(2)

    def kill(event):
        if is_unit(2)(event):
            nodes.kill(killed)

    seen = Seen(kill)
    run(llama, tmp_path / "out", text, on_event=seen, **ELSEWHERE)
    assert contents(tmp_path / "out") == reference
    assert seen.named("lost")
    assert {lost["cause"] for lost in seen.named("lost")} <= {"lost its node", "died"}
    assert {lost["decided"] for lost in seen.named("lost")} <= {"repeat"}
    assert seen.all_are_gone()


@pytest.mark.ray
def test_a_gpu_that_no_worker_sees_ends_a_run_as_it_starts(
    llama, text, tmp_path, nodes, monkeypatch
):
    """Workers with GPUs that this machine lacks end it: node and build are named, exit code 4."""
    nodes.fill(1)
    monkeypatch.delenv(PRETENDED)
    with pytest.raises(
        InputError, match=r"^node .*: Ray gave a worker GPU [01], but torch .*"
    ) as e:
        run(llama, tmp_path / "out", text, executor="ray", workers=1)
    assert e.value.exit_code == 4


@pytest.mark.ray
def test_a_sick_gpu_costs_its_worker_and_counts_against_its_node(
    llama, text, reference, tmp_path, nodes, inject
):
    """Its exceptions do not end the run: three in different processes quarantine the node."""
    sick, _ = nodes.fill(2)

    def fault(command):
        import ray

        if not isinstance(command, Finish):
            return
        if ray.get_runtime_context().get_node_id() == sick:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nAdvice")
        wait_until_there_are(3, tmp_path / "out.run", "failures/*.json")

    inject(fault)
    seen = Seen()
    run(llama, tmp_path / "out", text, on_event=seen, **SPREAD)
    assert contents(tmp_path / "out") == reference
    lost = seen.named("lost")[:3]
    assert {each["cause"] for each in lost} == {"died"}
    why = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"
    assert {each["why"] for each in lost} == {why}
    assert len({each["pid"] for each in lost}) == 3
    assert lost[2]["decided"] == "repeat and quarantine the node"
    assert all("in fault" in each["log"] for each in records(tmp_path / "out.run")[:3])
    (quarantined,) = seen.named("quarantined")
    assert sick[:8] in quarantined["node"]
    assert seen.all_are_gone()


@pytest.mark.ray
def test_a_gpu_that_fails_as_its_worker_starts_costs_that_worker(
    llama, text, reference, tmp_path, nodes, monkeypatch
):
    """It counts as the death of the worker, which is replaced."""
    nodes.fill(1)
    is_first = Once(tmp_path / "failed")

    class WorkerWithoutDevice(CompressionWorker):
        def __init__(self, task):
            if is_first():
                raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy")
            super().__init__(task)

    monkeypatch.setattr(driver, "CompressionWorker", WorkerWithoutDevice)
    seen = Seen()
    run(llama, tmp_path / "out", text, on_event=seen, **PAIR)
    assert (tmp_path / "failed").exists()
    assert contents(tmp_path / "out") == reference
    assert len(seen.workers) == PAIR["workers"]
    assert not seen.named("lost")


def test_a_gpu_that_fails_in_this_process_leaves_a_run_to_be_resumed(
    llama, text, reference, tmp_path, inject
):
    """It ends as failed with advice, committed units stay, and the next process ends the run."""

    def fault(command):
        if command == Finish(6):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    inject(fault)
    seen = Seen()
    with pytest.raises(WorkerError, match=r"the GPU of this process failed.* illegal memory .*Xid"):
        run(llama, tmp_path / "out", text, on_event=seen, shards=5)
    status = RunDirectory(tmp_path / "out.run").status()
    assert (status["state"], status["exit_code"]) == ("failed", WorkerError.exit_code)
    assert units(seen.events) == 6
    inject(lambda command: None)
    run(llama, tmp_path / "out", text, on_event=seen, shards=5)
    assert units(seen.events) == 6 + 4
    assert contents(tmp_path / "out") == reference


def too_large(command):
    """Shards of more than one block do not fit."""
    if isinstance(command, Open) and len(range(*command.blocks)) > 1:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.2 GiB")


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_what_does_not_fit_is_held_in_parts(
    executor, llama, text, reference, tmp_path, inject, request
):
    """The same bytes from shards of one block, and no failure of anybody."""
    spread = {"executor": "local", "shards": 3}
    if executor == "ray":
        request.getfixturevalue("nodes").fill(1)
        # two of ten blocks in the first shard; each shard that does not fit costs a process
        spread = PAIR | {"shards": 9}
    inject(too_large)
    seen = Seen()
    run(llama, tmp_path / "out", text, on_event=seen, **spread)
    assert contents(tmp_path / "out") == reference
    lost = seen.named("lost")
    assert {each["decided"] for each in lost} == {"repeat in smaller parts"}
    assert {each["cause"] for each in lost} == {"ran out of memory"}
    assert all("CUDA out of memory" in each["log"] for each in records(tmp_path / "out.run"))
    assert seen.all_are_gone() or executor == "local"


def test_a_block_that_does_not_fit_is_infeasible(llama, text, reference, tmp_path, inject):
    """Exit code 3, with what was tried and what to do; with more memory the run is resumed."""

    def fault(command):
        if command == Finish(6):
            raise MemoryError("cannot allocate 7 GB")

    inject(fault)
    seen = Seen()
    with pytest.raises(InfeasibleError, match=r"^block 6, finish: .*cannot allocate 7 GB; .*"):
        run(llama, tmp_path / "out", text, on_event=seen, shards=5)
    decided = [record["decided"] for record in records(tmp_path / "out.run")]
    assert decided == ["repeat in smaller parts", "repeat", "repeat", "end the run"]
    assert RunDirectory(tmp_path / "out.run").status()["exit_code"] == 3
    assert units(seen.events) == 6
    inject(lambda command: None)
    run(llama, tmp_path / "out", text, shards=5)
    assert contents(tmp_path / "out") == reference
