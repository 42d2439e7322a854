"""Argument and result of a forecast."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.rates import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Workers and machines of a run."""

    workers: int
    machine: Machine
    memory_bytes: float | None
    """Memory of a worker's device, or of its share of a host; None: that of the machine."""
    host_bytes: float | None = None
    """Host memory of a worker with a device; not checked if None."""
    price: float | None = None
    """Price of a worker for an hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """Cost of one stage of the run."""

    name: str
    flops: float
    """Sum over all workers."""
    seconds: Mapping[str, float]
    """Seconds by row of rates."""
    device: Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Cost of a run; plain data, to JSON."""

    model: Mapping[str, Any]
    machine: str
    is_gpu: bool
    """True if memory of stages is that of a GPU, with `host` beside it; else the host's."""
    workers: int
    shards: int
    blocks_a_shard: int
    blocks_that_fit: int
    """Blocks of a shard: two at most unless more share a basis."""
    experts: Mapping[str, int]
    """Experts of a block, their groups, and the bytes of rows and Grams of one group; empty without
    targeted experts."""
    waves: int
    stages: tuple[StageForecast, ...]
    limits: Mapping[str, float | None]
    """Bytes of a worker's device, and usable bytes of its device and of its host."""
    host: Footprint
    run: Mapping[str, Footprint]
    """Peak content of the run directory, by stage."""
    segments: int
    """Segments of the backward pass; all but the last take one more forward pass."""
    keeps_states: bool
    """True if a stopped training resumes from a snapshot; else it begins again."""
    moved_bytes: float
    """Boundary chunks, written and read again."""
    final: Mapping[str, int]
    """Values of the result, and their bytes."""
    index_bytes: int
    """Bytes of the indices beside them, such as the positions of entries."""
    float64: Mapping[str, Mapping[str, float]]
    """Seconds of a worker in float64, see `doubles`."""
    float64_remark: str
    """Remark if products in float64 take most of the time; empty if they do not."""
    start_seconds: Mapping[str, float]
    price: float | None
    sources: tuple[str, ...]
    infeasible: tuple[str, ...]
    """Reasons the run is infeasible, each with a remedy; empty if it is feasible."""

    @property
    def expert_groups(self) -> int:
        """Groups of experts, each gathered by passes of its own."""
        return self.experts.get("groups", 1)

    @property
    def seconds(self) -> dict[str, float]:
        return {
            row: start + sum(stage.seconds[row] for stage in self.stages)
            for row, start in self.start_seconds.items()
        }

    @property
    def peak(self) -> StageForecast:
        """The stage whose workers hold the most."""
        return max(self.stages, key=lambda stage: stage.device.total)

    @property
    def run_peak(self) -> str:
        """The stage in which the run directory is largest."""
        return max(self.run, key=lambda name: self.run[name].total)

    @property
    def run_bytes(self) -> int:
        """Largest size of the run directory."""
        return self.run[self.run_peak].total

    @property
    def result_bytes(self) -> int:
        """Bytes of the tensors of the result."""
        return self.final["bytes"] + self.index_bytes

    @property
    def money(self) -> dict[str, float] | None:
        if self.price is None:
            return None
        return {r: s / 3600 * self.workers * self.price for r, s in self.seconds.items()}

    def to_json(self) -> dict[str, Any]:
        figures = {"seconds": self.seconds, "money": self.money, "run_bytes": self.run_bytes}
        said = asdict(self)
        if not self.experts:
            del said["experts"]
        return {**said, **figures, "result_bytes": self.result_bytes}
