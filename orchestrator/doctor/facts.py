"""Facts about this machine; imports heavy libraries one at a time, and starts no process."""

import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import Any

from orchestrator.version import installed_versions

IMPORTED = ("torch", "transformers", "ray", "pyarrow", "safetensors", "accelerate")
"""Libraries with compiled parts, or that import such; an installed one may still not work."""
CONNECT_SECONDS = 2.0
PROBE_BYTES = 16 * 2**20
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
RAY_ADDRESS_FILE = Path("ray", "ray_current_cluster")
"""File in which Ray notes the cluster that was started last, below its temporary directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFacts:
    """Requirements of this package as in its metadata, and the installed versions."""

    python: str
    requires_python: str | None
    requirements: Sequence[str]
    """Lines such as `torch>=2.9`; those of extras have a marker. Empty without metadata."""
    installed: dict[str, str | None]
    import_errors: dict[str, str]
    """First line of the error by library; only libraries whose import failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """CUDA devices that torch sees, and an NVIDIA driver if the kernel has one."""

    names: Sequence[str] = ()
    memory_bytes: Sequence[int] = ()
    cuda: str | None = None
    """CUDA version that torch was built for; None for a build without CUDA."""
    driver: str | None = None
    cpus: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RayFacts:
    """Address of a cluster, its origin, and the result of a TCP connection."""

    address: str | None = None
    origin: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """Space of a directory, bytes; speed of a synchronised write, bytes per second."""

    purpose: str
    path: str
    free: int
    total: int
    is_writable: bool
    write_speed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """Memory, bytes, and the limit of open files of a process."""

    total: int
    available: int
    limit: int | None
    """Limit of the control group; None without one."""
    shared_free: int
    open_files: int
    open_files_most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts of `doctor`."""

    packages: PackageFacts
    devices: DeviceFacts
    ray: RayFacts
    disks: Sequence[DiskFacts]
    memory: MemoryFacts


def gather(address: str | None = None) -> Facts:
    """Gather the facts of this machine; takes the time that the libraries take to import."""
    return Facts(
        packages=_packages(),
        devices=_devices(),
        ray=_ray(address),
        disks=_disks(),
        memory=_memory(),
    )


def _packages() -> PackageFacts:
    from packaging.requirements import Requirement

    try:
        lines, python = requires("orchestrator") or [], metadata("orchestrator")["Requires-Python"]
    except PackageNotFoundError:  # a source tree on the path
        lines, python = [], None
    names = {Requirement(line).name: None for line in lines}
    return PackageFacts(
        python=".".join(map(str, sys.version_info[:3])),
        requires_python=python,
        requirements=lines,
        installed=installed_versions({**dict.fromkeys(IMPORTED), **names}),
        import_errors={name: error for name in IMPORTED if (error := _import_error(name))},
    )


def _import_error(name: str) -> str | None:
    try:
        import_module(name)
    except Exception as error:  # a broken library may raise anything
        first = str(error).strip().splitlines()[:1]
        return ": ".join([type(error).__name__, *first])
    return None


def _devices() -> DeviceFacts:
    driver = Path("/proc/driver/nvidia/version")
    found: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0))}
    if driver.is_file():
        found["driver"] = driver.read_text().splitlines()[0]
    try:
        cuda = import_module("torch").cuda
        devices = [cuda.get_device_properties(n) for n in range(cuda.device_count())]
        found["cuda"] = import_module("torch").version.cuda
    except Exception:  # torch is absent or broken, which is a finding of its own
        return DeviceFacts(**found)
    names, sizes = [each.name for each in devices], [each.total_memory for each in devices]
    return DeviceFacts(**found, names=names, memory_bytes=sizes)


def _ray(address: str | None) -> RayFacts:
    noted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / RAY_ADDRESS_FILE
    if address in (None, "auto"):
        address, origin = os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS"
        if address in (None, "auto", "local") and noted.is_file():
            address, origin = noted.read_text().strip(), str(noted)
    else:
        origin = "--address"
    if address in (None, "", "auto", "local"):
        return RayFacts()
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        return RayFacts(address=address, origin=origin, error=str(error))
    return RayFacts(address=address, origin=origin)


def _disks() -> list[DiskFacts]:
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    temporary = tempfile.gettempdir()
    return [
        _disk("working directory", os.getcwd()),
        _disk("temporary files", temporary, write_speed=_write_speed(temporary)),
        _disk("hub cache", hub),
    ]


def _disk(purpose: str, path: str, write_speed: float | None = None) -> DiskFacts:
    """Measure the disk of a directory; of one that does not exist yet, of its nearest parent."""
    there = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    usage = shutil.disk_usage(there)
    return DiskFacts(
        purpose=purpose,
        path=path,
        free=usage.free,
        total=usage.total,
        is_writable=os.access(there, os.W_OK),
        write_speed=write_speed,
    )


def _write_speed(directory: str) -> float | None:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            start = time.perf_counter()
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return PROBE_BYTES / (time.perf_counter() - start)
    except OSError:
        return None


def _memory() -> MemoryFacts:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    limits = [Path(name).read_text().strip() for name in CGROUP_LIMITS if Path(name).is_file()]
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MemoryFacts(
        total=sizes["MemTotal"],
        available=sizes["MemAvailable"],
        limit=min((int(limit) for limit in limits if limit.isdigit()), default=None),
        shared_free=shared,
        open_files=soft,
        open_files_most=hard,
    )
