"""Judgement of the facts of a machine: one finding per item, with a remedy unless it is ok."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from orchestrator.doctor.facts import (
    DeviceFacts,
    DiskFacts,
    Facts,
    MemoryFacts,
    PackageFacts,
    RayFacts,
)
from orchestrator.readable import counted, size

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

State = Literal["ok", "warning", "missing"]

PURPOSES = {
    "datasets": "calibration texts `datasets:NAME`",
    "lm-eval": "tasks of lm-evaluation-harness (`evaluate --tasks`, `lm-eval`)",
    "mlflow": "`--track mlflow`",
    "recovery": "training of adapters on a compressed model (scripts/recover.py)",
    "search": "`--allocation search`",
    "tensorboard": "`--track tensorboard`",
    "trackio": "`--track trackio`",
    "vision": "calibration and evaluation on images",
    "wandb": "`--track wandb`",
}
"""Use of each extra of the package."""
FULL_DISK = 0.95
"""Used fraction of a disk at which Ray stops to write objects to it."""
LEAST_OPEN_FILES = 4096
"""Limit of open files below which Ray warns."""
SLOW_WRITES = 20e6
"""Bytes per second below which a disk is called slow."""
STORE_FRACTION, STORE_MOST, STORE_WITHOUT_SHARED = 0.3, 200e9, 10e9
"""Size of Ray's object store: this fraction of the memory, at most this many bytes, and at most
/dev/shm where that is above the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Judgement of one item."""

    item: str
    found: str
    state: State = "ok"
    remedy: str = ""
    """Advice; empty if the state is ok."""
    is_required: bool = False
    """True if no model can be compressed without the item."""

    @property
    def fails(self) -> bool:
        return self.is_required and self.state == "missing"


def judge(facts: Facts) -> list[Finding]:
    """Judge all facts, in the order of the output."""
    return [
        *check_packages(facts.packages),
        *check_extras(facts.packages),
        check_devices(facts.devices),
        check_ray(facts.ray),
        *map(check_disk, facts.disks),
        *check_memory(facts.memory),
    ]


def check_packages(facts: PackageFacts) -> Iterator[Finding]:
    """Check Python and every required library: presence, version, import."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    yield _versioned("Python", facts.python, SpecifierSet(facts.requires_python or ""), "")
    needed = [Requirement(line) for line in facts.requirements]
    for each in needed:
        if each.marker is None:
            error = facts.import_errors.get(each.name, "")
            yield _versioned(each.name, facts.installed[each.name], each.specifier, error)
    if not needed:
        yield Finding(
            item="metadata",
            found="orchestrator is on the path but not installed: versions are not checked",
            state="warning",
            remedy="pip install .",
        )
        for name, version in sorted(facts.installed.items()):
            yield _versioned(name, version, SpecifierSet(), facts.import_errors.get(name, ""))


def _versioned(item: str, version: str | None, allowed: "SpecifierSet", error: str) -> Finding:
    state: State = "missing"
    wanted, remedy = f"{item}{allowed}", "pip install"
    if version is None:
        found = "not installed"
    elif not allowed.contains(version, prereleases=True):
        found = f"{version}, outside of {allowed}"
    elif error:
        found, remedy = f"{version}, cannot be imported: {error}", "pip install --force-reinstall"
    else:
        found, state = f"{version} ({allowed})" if str(allowed) else version, "ok"
    remedy = f"{remedy} '{wanted}'" if item != "Python" else "use such a Python"
    return Finding(
        item=item,
        found=found,
        state=state,
        remedy="" if state == "ok" else remedy,
        is_required=True,
    )


def check_extras(facts: PackageFacts) -> Iterator[Finding]:
    """Check the libraries of the extras, none of which is required."""
    from packaging.requirements import Requirement

    for line in facts.requirements:
        each = Requirement(line)
        for extra in _extras(each):
            version = facts.installed[each.name]
            purpose = f"for {PURPOSES.get(extra, extra)}"
            if version is not None and each.specifier.contains(version, prereleases=True):
                yield Finding(item=each.name, found=f"{version} ({each.specifier}), {purpose}")
                continue
            found = f"{version}, outside of {each.specifier}" if version else "not installed"
            yield Finding(
                item=each.name,
                found=f"{found}, {purpose}",
                state="warning" if version else "missing",
                remedy=f"pip install 'orchestrator[{extra}]'",
            )


def _extras(requirement: "Requirement") -> list[str]:
    """Names of the extras in the marker of a requirement."""
    said = str(requirement.marker or "").replace("'", '"')
    return [part.split('"')[1] for part in said.split("extra ==")[1:]]


def check_devices(facts: DeviceFacts) -> Finding:
    """Check the GPUs; their absence is in order unless a driver is loaded."""
    if facts.names:
        pairs = zip(facts.names, facts.memory_bytes, strict=True)
        found = ", ".join(f"{name} with {size(memory)}" for name, memory in pairs)
        return Finding(item="devices", found=f"{found}; CUDA {facts.cuda}")
    cpus = counted(facts.cpus, "CPU")
    if facts.driver is None:
        return Finding(item="devices", found=f"no GPU; one worker per CPU, {cpus}")
    built = f"for CUDA {facts.cuda}" if facts.cuda else "without CUDA"
    return Finding(
        item="devices",
        found=f"{cpus}; torch, built {built}, sees no GPU, but a driver is loaded: {facts.driver}",
        state="warning",
        remedy="install a torch for this driver, and look at CUDA_VISIBLE_DEVICES",
    )


def check_ray(facts: RayFacts) -> Finding:
    """Check the connection to a cluster; without one, a run starts a Ray of its own."""
    if facts.address is None:
        return Finding(item="Ray cluster", found="none; a run starts Ray on this machine")
    where = f"{facts.address} (from {facts.origin})"
    if facts.error is None:
        return Finding(item="Ray cluster", found=f"{where} answers")
    return Finding(
        item="Ray cluster",
        found=f"{where} does not answer: {facts.error}",
        state="warning",
        remedy="start it (`ray start --head`), open its port, or give another --address",
    )


def check_disk(facts: DiskFacts) -> Finding:
    """Check that a directory can be written and its disk is not full."""
    item, where = facts.purpose, f"{facts.path}, {size(facts.free)} of {size(facts.total)} free"
    if facts.write_speed is not None:
        where += f", writes {size(facts.write_speed)}/s"
    if not facts.is_writable:
        return Finding(
            item=item, found=f"{where}, not writable", state="warning", remedy="change its owner"
        )
    if facts.free < (1 - FULL_DISK) * facts.total:
        remedy = "free some space: Ray and a run stop when a disk is full"
        return Finding(item=item, found=where, state="warning", remedy=remedy)
    if facts.write_speed is not None and facts.write_speed < SLOW_WRITES:
        remedy = "set TMPDIR to a directory on a faster, local disk"
        return Finding(item=item, found=where, state="warning", remedy=remedy)
    return Finding(item=item, found=where)


def check_memory(facts: MemoryFacts) -> Iterator[Finding]:
    """Check memory, the room for Ray's object store, and the limit of open files."""
    usable = min(facts.total, facts.limit or facts.total)
    limited = " by a control group" if usable < facts.total else ""
    free = min(facts.available, usable)
    yield Finding(item="memory", found=f"{size(usable)}{limited}, {size(free)} available")

    most = max(STORE_WITHOUT_SHARED, 0.95 * facts.shared_free)
    store = min(STORE_FRACTION * free, STORE_MOST, most)
    shared = f"{size(facts.shared_free)} free, Ray's object store takes {size(store)}"
    if facts.shared_free >= store:
        yield Finding(item="/dev/shm", found=shared)
    else:
        yield Finding(
            item="/dev/shm",
            found=f"{shared}: Ray will use temporary files instead, which is slower",
            state="warning",
            remedy=f"docker run --shm-size={store / 2**30:.0f}g, or mount a larger one",
        )

    # Ray raises the limit of its processes as far as it may
    files = max(facts.open_files, min(facts.open_files_most, 65536))
    if files >= LEAST_OPEN_FILES:
        yield Finding(item="open files", found=f"at most {files} per process")
    else:
        yield Finding(
            item="open files",
            found=f"at most {files} per process, Ray needs {LEAST_OPEN_FILES}",
            state="warning",
            remedy="ulimit -n 8192",
        )
