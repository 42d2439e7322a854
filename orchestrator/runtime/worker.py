"""What every worker is: a plain class that performs one call at a time, in an actor or here.

A worker keeps no truth. What it has computed it commits to the run directory; what it holds in
memory (weights, statistics) can be made again by any other worker from what lies there.
"""

import gc
import os
import platform
import resource
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from orchestrator.device import gpu
from orchestrator.device.malloc import keep_freed_memory, return_freed_memory
from orchestrator.device.transport import Departure, Pace
from orchestrator.errors import InputError
from orchestrator.models.shards.chunk import Chunk
from orchestrator.runtime.calls import Command, Open, Step
from orchestrator.store.chunks import Chunks, MissingChunk, Record
from orchestrator.store.files import digest_file
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory
from orchestrator.usage import DeviceUsage, Usage
from orchestrator.version import __version__

Emitted = Record | None
Stored = tuple[Chunks, int, int]
"""Place of a stored chunk: its pass, boundary and index."""
PROBE_PREFIX = ".probe-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all workers of a run share: paths that every node must see, threads, and the pass."""

    run_dir: Place
    threads: int
    pass_key: str
    fingerprints: Mapping[Place, str]
    """Every model that is read, with the fingerprint that the driver saw."""
    writes: tuple[Place, ...] = ()
    """Directories that are written to."""


class Worker:
    """Base of the workers; subclasses have the methods that commands name."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        keep_freed_memory()
        # whatever a container's environment says of TF32; see `linalg.tensor_cores`
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        self._threads = task.threads
        self._reads, self._writes = task.fingerprints, task.writes
        self.run = RunDirectory(task.run_dir)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.chunks: Chunks = self.run.chunks(task.pass_key, self.environment())
        # one for the chunk that is written, one for what is read ahead
        self._disk = ThreadPoolExecutor(max_workers=2)
        self._writing: Future[None] | None = None
        self._departure = Departure()
        self._coming: dict[Stored, Future[Chunk | None]] = {}
        self._pace = Pace(self.device)

    def measured(self, command: Command, *records: Emitted) -> tuple[Any, Emitted, Usage]:
        """Execute a command, as `perform`. Returns its peak memory, too."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        value, emitted = self.perform(command, *records)
        return value, emitted, self.usage()

    def release(self) -> None:
        """Lets go of what the worker holds; nothing is called after it."""
        self.flush_writes()
        self._disk.shutdown()
        vars(self).clear()
        gc.collect()
        return_freed_memory()

    def perform(self, command: Command, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a command. Returns its result and, if requested, the output chunk.

        A chunk is on its way to its file while the next is computed, and the weights of the blocks
        that are likely to be next are on theirs to the system's cache. The last chunk is in its
        file when its call ends.

        A GPU may still compute when the call of a step ends, unless its chunk is handed over:
        meanwhile the chunk is copied to the host, and the next one is read.
        """
        if isinstance(command, Step):
            self._pace.step()
            value, emitted = self.step(command.index, command.emit, record)
            # after a chunk that was handed over the next one probably is, too
            self._read_next(command.next_index if record is None else None)
            if command.next_index is None:
                self.flush_writes()
            if not command.hand_over:
                return value, None
            self._departure.wait()
            return value, emitted
        self.flush_writes()
        self._coming = {}
        if isinstance(command, Open):
            self.open(command.blocks, command.todo, *command.about)
            if command.ahead is not None:
                self._disk.submit(self.read_ahead, range(*command.ahead))
            return None, None
        return getattr(self, command.method)(**command.keywords()), None

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Takes a shard; subclasses say how."""
        raise NotImplementedError

    def read_ahead(self, blocks: range) -> None:
        """Has blocks that are not needed yet read from storage; nothing that a result needs."""

    def flush_writes(self) -> None:
        """Waits until what was emitted is in its file.

        Raises:
            OSError: It could not be written; so do errors of a store.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one chunk through the open shard; subclasses say how."""
        raise NotImplementedError

    def verify(self, files: Sequence[tuple[Place, str]]) -> bool:
        """Whether every file has the BLAKE2b that is given with it."""
        try:
            return all(digest_file(path) == digest for path, digest in files)
        except OSError:
            return False

    def probe(self, nonce: str) -> dict[str, Any]:
        """Proves that this node sees what it must, and says what it is.

        Raises:
            InputError: The model differs from the driver's, or a probe file that the driver wrote
                is not seen here; the message names the node.
        """
        from orchestrator.models.checkpoint.weights import Weights

        node = f"node {socket.gethostname()}"
        for model, expected in self._reads.items():
            try:
                found = Weights.open(model).fingerprint
            except InputError as error:
                raise InputError(f"{node}: does not see the model: {error}") from error
            if found != expected:
                raise InputError(
                    f"{node}: {model} has fingerprint {found[:12]}, the driver's has "
                    f"{expected[:12]}; every node must read the same checkpoint"
                )
        for directory in self._writes:
            if not (directory / f"{PROBE_PREFIX}{nonce}").exists():
                raise InputError(
                    f"{node}: does not see {directory} as the driver does; "
                    "give a path on storage that all nodes share"
                )
        return {
            "environment": self.environment(),
            "node": socket.gethostname(),
            "pid": os.getpid(),
            "device_bytes": gpu.memory_bytes(),
        }

    def environment(self) -> dict[str, Any]:
        """What can change bits beside the units' keys."""
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if is_gpu else platform.machine()
        return {
            "device": f"{self.device.type} {name}",
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": self._threads,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "orchestrator": __version__,
            **(gpu.versions() if is_gpu else {}),
        }

    def usage(self) -> Usage:
        """Peak memory of the process on the host, and of the call so far on a GPU."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type != "cuda":
            return Usage(host=host)
        free, total = torch.cuda.mem_get_info(self.device)
        # used by the driver's count, outside of the allocator: CUDA's context and libraries
        context = max(total - free - torch.cuda.memory_reserved(self.device), 0)
        device = DeviceUsage(
            allocated=torch.cuda.max_memory_allocated(self.device),
            reserved=torch.cuda.max_memory_reserved(self.device),
            context=context,
        )
        return Usage(host=host, device=device)

    def input_record(self, boundary: int, index: int, record: Emitted) -> Record:
        """What lies at a boundary: what was handed over, or else its file.

        Raises:
            MissingChunk: Neither is there, or the file is damaged.
        """
        if record is None:
            record = self.chunks.await_written(boundary, index)
        if record is None:
            raise MissingChunk(boundary, index)
        return record

    def input_chunk(self, boundary: int, index: int, record: Emitted) -> Chunk:
        """The chunk at a boundary, for immediate use by a shard.

        Raises:
            MissingChunk: As `input_record`.
        """
        return self.take_coming(self.chunks, boundary, index, record) or self.unpack(
            self.input_record(boundary, index, record)
        )

    def take_coming(
        self, chunks: Chunks, boundary: int, index: int, record: Emitted = None
    ) -> Chunk | None:
        """A stored chunk that was read during the previous step; None if it was not."""
        coming = self._coming.pop((chunks, boundary, index), None)
        return coming.result() if coming is not None and record is None else None

    def next_inputs(self, index: int) -> list[Stored]:
        """Stored chunks that the step of an index takes by `take_coming`; none by default."""
        return []

    def _read_next(self, index: int | None) -> None:
        """Starts to read the input of the next step while a GPU computes this one.

        On a CPU the reading thread would compete with the one that computes.
        """
        wanted = self.next_inputs(index) if index is not None and self._has_gpu else []
        self._coming = {each: self._disk.submit(self._read_chunk, *each) for each in wanted}

    def _read_chunk(self, chunks: Chunks, boundary: int, index: int) -> Chunk | None:
        record = chunks.read(boundary, index)
        return None if record is None else self.unpack(record)

    @property
    def _has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def unpack(self, record: Record) -> Chunk:
        """A chunk for immediate use on the device."""
        return Chunk.unpack(record, pinned=self._has_gpu)

    def emit(self, boundary: int, chunk: Chunk) -> Record:
        """Starts to store a chunk behind the shard; its record is complete after `Departure`."""
        departure = Departure()
        record = chunk.pack(departure)
        self.store(boundary, chunk.index, record, departure)
        return record

    def store(
        self,
        boundary: int,
        index: int,
        record: Record,
        departure: Departure,
        chunks: Chunks | None = None,
    ) -> None:
        """Writes a chunk in a thread once it has left the device, after the previous one.

        Args:
            chunks: Store of another pass, instead of the worker's own.

        Raises:
            OSError: The previous one could not be written; so do errors of a store.
        """
        self.flush_writes()
        self._departure = departure
        write = (chunks or self.chunks).write

        def write_departed() -> None:
            departure.wait()
            write(boundary, index, record)

        self._writing = self._disk.submit(write_departed)


def check_alike(probe: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises InputError unless two workers' probes tell of the same environment."""
    for name, value in probe["environment"].items():
        if value != first["environment"][name]:
            raise InputError(
                f"node {probe['node']}: {name} is {value}, on node {first['node']} it is "
                f"{first['environment'][name]}; all workers of a run must be alike, or its bits "
                "would depend on who did what"
            )
