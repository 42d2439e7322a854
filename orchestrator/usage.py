"""Peak memory of a worker, on its host and its GPU."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from orchestrator.readable import size


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUsage:
    """Peak memory on a GPU, bytes."""

    allocated: int
    """Peak bytes in tensors."""
    reserved: int
    """Peak bytes that the allocator of torch has reserved."""
    context: int
    """Bytes outside of the allocator: CUDA context, libraries, and other processes."""

    @property
    def total(self) -> int:
        """Bytes to compare with the forecast of a GPU."""
        return self.reserved + self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Peak memory of a worker, or the maxima of several, bytes."""

    host: int
    """Maximum resident size of the process since its start, file pages included."""
    device: DeviceUsage | None = None
    """None without a GPU."""

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        device = said.get("device")
        return cls(host=said["host"], device=DeviceUsage(**device) if device else None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) if self.device else {"host": self.host}

    def merge(self, other: "Usage") -> "Usage":
        """Take the maximum of each figure."""
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
