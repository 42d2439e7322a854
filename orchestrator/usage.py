"""Memory of a worker at its worst, of the host and of its GPU apart."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from orchestrator.progress import size


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUsage:
    """Of a GPU; bytes."""

    allocated: int
    """The most that tensors have taken."""
    reserved: int
    """The most that torch's allocator has taken of the GPU for them."""
    context: int
    """In use outside of the allocator: CUDA's context, libraries, and any other process."""

    @property
    def total(self) -> int:
        """What a forecast for a GPU is compared with."""
        return self.reserved + self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Of one worker, or the largest of several, number by number; bytes."""

    host: int
    """The most that the process has held resident since it began, file pages included."""
    device: DeviceUsage | None = None
    """None without a GPU."""

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        device = said.get("device")
        return cls(host=said["host"], device=DeviceUsage(**device) if device else None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) if self.device else {"host": self.host}

    def merge(self, other: "Usage") -> "Usage":
        """The larger of both, number by number."""
        host = max(self.host, other.host)
        if self.device is None or other.device is None:
            return Usage(host=host, device=self.device or other.device)
        ours, theirs = asdict(self.device), asdict(other.device)
        device = DeviceUsage(**{name: max(ours[name], theirs[name]) for name in ours})
        return Usage(host=host, device=device)

    def __str__(self) -> str:
        host = f"host {size(self.host)}"
        if self.device is None:
            return host
        tensors = f"{size(self.device.reserved)} reserved, {size(self.device.allocated)} allocated"
        return f"device {tensors}, {size(self.device.context)} context; {host}"
