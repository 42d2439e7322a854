"""Base class of the workers, each of which executes one call at a time, in an actor or here.

A worker is stateless as far as results go: it commits them to the run directory, and any other
worker can restore the content of its memory (weights, statistics) from there. This package moves
records and knows no model: the functions that unpack a record and that identify a model are passed
in.
"""

import gc
import os
import platform
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import torch

from orchestrator.device import gpu
from orchestrator.device.malloc import keep_freed_memory, return_freed_memory
from orchestrator.device.transport import Departure, Pace
from orchestrator.errors import InputError
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
installed_version = cache(version)
"""Version of an installed package. Each unit records it, and parsing the metadata of a package
takes milliseconds, so it is done once a process."""


class Unpack(Protocol):
    """Function that unpacks a record to a chunk."""

    def __call__(self, record: Record, /, *, pinned: bool) -> Any:
        """Return the chunk, in page-locked memory if `pinned`."""
        ...


class Packable(Protocol):
    """A chunk that is emitted; the only properties of it that this package uses."""

    @property
    def index(self) -> int: ...

    def pack(self, departure: Departure) -> Record:
        """Return the record, whose arrays are complete after `departure.wait`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Description of the work for all workers of a run: paths, number of threads, and the pass."""

    run_dir: Place
    threads: int
    pass_key: str
    fingerprints: Mapping[Place, str]
    """Models to read, with the fingerprints that the driver found."""
    writes: tuple[Place, ...] = ()
    """Directories to write to."""


class Worker:
    """Base class of the workers; subclasses define the methods that commands name.

    Args:
        unpack: Unpacks the record of a chunk.
        fingerprint: Returns the fingerprint of a model; raises InputError if it cannot be read.
    """

    def __init__(self, task: Task, *, unpack: Unpack, fingerprint: Callable[[Place], str]) -> None:
        torch.set_num_threads(task.threads)
        keep_freed_memory()
        # independent of a container's environment variables for TF32; see `linalg.tensor_cores`
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        self._threads = task.threads
        self._unpack, self._fingerprint = unpack, fingerprint
        self._reads, self._writes = task.fingerprints, task.writes
        self.run = RunDirectory(task.run_dir)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.chunks: Chunks = self.run.chunks(task.pass_key, self.environment())
        # one thread writes chunks, one reads ahead
        self._disk = ThreadPoolExecutor(max_workers=2)
        self._writing: Future[None] | None = None
        self._departure = Departure()
        self._coming: dict[Stored, Future[Any]] = {}
        self._pace = Pace(self.device)

    def measured(self, command: Command, *records: Emitted) -> tuple[Any, Emitted, Usage]:
        """Execute a command, as `perform`; also returns its peak memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        value, emitted = self.perform(command, *records)
        return value, emitted, self.usage()

    def release(self) -> None:
        """Free all memory of the worker; no call may follow."""
        self.flush_writes()
        self._disk.shutdown()
        vars(self).clear()
        gc.collect()
        return_freed_memory()

    def perform(self, command: Command, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a command. Returns its small result and, if requested, the output record.

        An output chunk is written to its file while the next one is computed, and the weights of
        the blocks that are likely to be next are read into the system's cache. The last chunk is in
        its file when its call ends.

        A GPU may still be computing when the call of a step ends, unless the record is returned:
        meanwhile the chunk is copied to the host and the next one is read.
        """
        if isinstance(command, Step):
            self._pace.step()
            value, emitted = self.step(command.index, command.emit, record)
            # if this chunk was handed over, the next one probably will be, too
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
        """Open a shard; defined by subclasses."""
        raise NotImplementedError(f"{type(self).__name__} opens no shard")

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the weights of later blocks; best effort, results do not depend on it."""

    def flush_writes(self) -> None:
        """Wait until the emitted chunk is in its file.

        Raises:
            OSError: It could not be written; errors of a store are raised too.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one chunk through the open shard; defined by subclasses."""
        raise NotImplementedError(f"{type(self).__name__} passes no chunks")

    def verify(self, files: Sequence[tuple[Place, str]]) -> bool:
        """Return True if every file has the given BLAKE2b digest."""
        try:
            return all(digest_file(path) == digest for path, digest in files)
        except OSError:
            return False

    def probe(self, nonce: str) -> dict[str, Any]:
        """Check that this node sees the driver's files; describe the node.

        Raises:
            InputError: The model differs from the driver's, or a probe file of the driver is not
                visible here; the message names the node.
        """
        node = f"node {socket.gethostname()}"
        for model, expected in self._reads.items():
            try:
                found = self._fingerprint(model)
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
        """Properties of the machine and its software that can change the bits of a result."""
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if is_gpu else platform.machine()
        return {
            "device": f"{self.device.type} {name}",
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": self._threads,
            "torch": torch.__version__,
            "transformers": installed_version("transformers"),
            "orchestrator": __version__,
            **(gpu.versions() if is_gpu else {}),
        }

    def usage(self) -> Usage:
        """Peak memory: of the process on the host, and of the current call on a GPU."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type != "cuda":
            return Usage(host=host)
        free, total = torch.cuda.mem_get_info(self.device)
        # memory that the driver reports outside of the allocator: CUDA's context and libraries
        context = max(total - free - torch.cuda.memory_reserved(self.device), 0)
        device = DeviceUsage(
            allocated=torch.cuda.max_memory_allocated(self.device),
            reserved=torch.cuda.max_memory_reserved(self.device),
            context=context,
        )
        return Usage(host=host, device=device)

    def input_record(self, boundary: int, index: int, record: Emitted) -> Record:
        """Return the record at a boundary: as handed over, otherwise from its file.

        Raises:
            MissingChunk: Neither exists, or the file is damaged.
        """
        if record is None:
            record = self.chunks.await_written(boundary, index)
        if record is None:
            raise MissingChunk(boundary, index)
        return record

    def input_chunk(self, boundary: int, index: int, record: Emitted) -> Any:
        """Return the chunk at a boundary, for immediate use by a shard.

        Raises:
            MissingChunk: As `input_record`.
        """
        return self.take_coming(self.chunks, boundary, index, record) or self.unpack(
            self.input_record(boundary, index, record)
        )

    def take_coming(self, chunks: Chunks, boundary: int, index: int, record: Emitted = None) -> Any:
        """Return a stored chunk that was read during the previous step; None if it was not."""
        coming = self._coming.pop((chunks, boundary, index), None)
        return coming.result() if coming is not None and record is None else None

    def next_inputs(self, index: int) -> list[Stored]:
        """Stored chunks that the step of this index takes by `take_coming`; none by default."""
        return []

    def _read_next(self, index: int | None) -> None:
        """Start reading the input of the next step while a GPU computes this one.

        On a CPU the reading thread would compete with the one that computes.
        """
        wanted = self.next_inputs(index) if index is not None and self._has_gpu else []
        self._coming = {each: self._disk.submit(self._read_chunk, *each) for each in wanted}

    def _read_chunk(self, chunks: Chunks, boundary: int, index: int) -> Any:
        record = chunks.read(boundary, index)
        return None if record is None else self.unpack(record)

    @property
    def _has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def unpack(self, record: Record) -> Any:
        """Return the chunk of a record, for immediate use on the device."""
        return self._unpack(record, pinned=self._has_gpu)

    def emit(self, boundary: int, chunk: Packable) -> Record:
        """Start storing a chunk after the shard; its record is complete after `Departure.wait`."""
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
        *,
        chunks: Chunks | None = None,
    ) -> None:
        """Write a chunk in a thread once it has left the device, after the previous one.

        Args:
            chunks: Store of another pass; the worker's own by default.

        Raises:
            OSError: The previous one could not be written; errors of a store are raised too.
        """
        self.flush_writes()
        self._departure = departure
        write = (chunks or self.chunks).write

        def write_departed() -> None:
            departure.wait()
            write(boundary, index, record)

        self._writing = self._disk.submit(write_departed)


def check_alike(probe: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise InputError unless the probes of two workers show the same environment."""
    for name, value in probe["environment"].items():
        if value != first["environment"][name]:
            raise InputError(
                f"node {probe['node']}: {name} is {value}, on node {first['node']} it is "
                f"{first['environment'][name]}; all workers of a run must be alike, or its bits "
                "would depend on who did what"
            )
