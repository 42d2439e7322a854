"""Overlap in a worker: a chunk is computed while the previous one is written."""

import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from orchestrator.device.malloc import free_device_memory
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.runtime.calls import Command, Step
from orchestrator.runtime.worker import Task, Worker
from orchestrator.store.chunks import Chunks, MissingChunk


@dataclass(frozen=True, slots=True)
class ReadBack(Command):
    """Read the tokens of a chunk that was emitted."""

    method: ClassVar[str] = "read_back"

    index: int


class ChunkWorker(Worker):
    """Worker that passes chunks through no block."""

    def __init__(self, task):
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)

    def step(self, index, emit, record):
        tokens_BT = torch.full((1, 4), index)
        chunk = Chunk(index, tokens_BT, torch.ones(1, 4, dtype=torch.bool))
        return index, self.emit(2, chunk)

    def read_back(self, index):
        return Chunk.unpack(self.input_record(2, index, None)).tokens.tolist()


@pytest.fixture
def worker(tmp_path):
    task = Task(run_dir=tmp_path / "run", threads=1, pass_key="pass", fingerprints={})
    worker = ChunkWorker(task)
    yield worker
    worker.release()


@pytest.fixture
def gate(monkeypatch):
    """Gate that holds back the writing of chunks until it is set."""
    write, gate = Chunks.write, threading.Event()

    def wait(chunks, *arguments):
        assert gate.wait(30)
        write(chunks, *arguments)

    monkeypatch.setattr(Chunks, "write", wait)
    return gate


def test_a_chunk_is_computed_while_the_one_before_is_written(worker, gate):
    value, record = worker.perform(Step(0, emit=True, hand_over=True, next_index=1), None)
    assert value == 0
    assert record is not None
    assert not worker.chunks.path(2, 0).exists()
    # the second is not stored before the first is
    second = threading.Thread(target=worker.perform, args=(Step(1, True, True, 2), None))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(30)
    assert worker.chunks.path(2, 0).exists()


@pytest.mark.parametrize("command", [ReadBack(0), Step(1, emit=True, hand_over=True)])
def test_other_calls_and_the_last_chunk_find_or_leave_all_written(worker, command):
    """Another command, or the last step, ends with all chunks in their files."""
    worker.perform(Step(0, emit=True, hand_over=False, next_index=1), None)
    worker.perform(command, None)
    assert worker.chunks.present(2, 1 + command.index) == set(range(1 + command.index))


def test_a_chunk_that_could_not_be_written_ends_the_next_call(worker, monkeypatch):
    """The error of a failed write is raised once, by the next call."""

    def fail(chunks, boundary, index, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Chunks, "write", fail)
    worker.perform(Step(0, emit=True, hand_over=True, next_index=1), None)
    with pytest.raises(OSError, match="No space left"):
        worker.perform(Step(1, emit=True, hand_over=True, next_index=2), None)
    monkeypatch.undo()
    worker.perform(Step(1, emit=True, hand_over=True, next_index=None), None)
    assert worker.chunks.present(2, 2) == {1}


def test_a_chunk_on_its_way_is_waited_for_and_a_lost_one_is_not_for_long(
    worker, tmp_path, monkeypatch
):
    monkeypatch.setattr("orchestrator.store.chunks.WRITING_SECONDS", 0.2)
    with pytest.raises(MissingChunk):
        worker.perform(ReadBack(0), None)
    monkeypatch.setattr("orchestrator.store.chunks.WRITING_SECONDS", 30.0)
    other = ChunkWorker(Task(run_dir=tmp_path / "run", threads=1, pass_key="pass", fingerprints={}))
    other.chunks = worker.chunks
    late = threading.Timer(0.2, other.perform, (Step(0, emit=True), None))
    late.start()
    assert worker.perform(ReadBack(0), None)[0] == [[0, 0, 0, 0]]
    late.join()
    other.release()


def test_memory_that_the_allocator_keeps_is_free(monkeypatch):
    """Memory in PyTorch's cache is available for training: 10 + (70 − 30) bytes."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_device_memory(device) == 50


def test_a_call_is_measured_with_all_the_records_that_it_reads(worker, monkeypatch):
    """A call with several records is measured; without a GPU, host memory only."""
    monkeypatch.setattr(worker, "perform", lambda command, *records: (records, None))
    for records in (({"a": 1},), ({"a": 1}, {"a": 2}, None)):
        found, emitted, usage = worker.measured(ReadBack(0), *records)
        assert (found, emitted) == (records, None)
        assert usage.host > 10**7
        assert usage.device is None
