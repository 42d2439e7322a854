"""Events of a run as metrics of the Ray cluster, exported to Prometheus with Ray's own metrics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Counter, Gauge

from orchestrator.runtime.monitor import RunMonitor

PREFIX = "orchestrator_"


class Metrics:
    """Counters and gauges of a run; Ray exports them as `ray_orchestrator_...`.

    They belong to this driver: they start at zero when a run is resumed, like the metrics of any
    process.
    """

    def __init__(self) -> None:
        self._units = Counter(
            f"{PREFIX}units", description="Units of work that are done.", tag_keys=("stage",)
        )
        self._seconds = Counter(
            f"{PREFIX}unit_seconds",
            description="Seconds that workers spent on units, all workers together.",
            tag_keys=("stage",),
        )
        self._bytes = Counter(
            f"{PREFIX}unit_bytes", description="Bytes of committed units.", tag_keys=("stage",)
        )
        self._stage_seconds = Counter(
            f"{PREFIX}stage_seconds",
            description="Wall time of the stages that have ended.",
            tag_keys=("stage",),
        )
        self._failures = Counter(
            f"{PREFIX}failures",
            description="Failed calls, by cause and by decision.",
            tag_keys=("cause", "decided"),
        )
        self._left = Gauge(
            f"{PREFIX}units_left",
            description="Units that are left to do.",
            tag_keys=("stage",),
        )
        self._workers = Gauge(f"{PREFIX}workers", description="Workers that are ready.")

    @contextmanager
    def following(self, monitor: RunMonitor) -> Iterator[None]:
        """Record the events of a run inside the context."""
        try:
            with monitor.followed(self.note):
                yield
        finally:
            self._workers.set(0)

    def note(self, event: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Record one event.

        Args:
            status: Status of the run after the event.
        """
        match event:
            case {"event": "unit", "stage": stage, "done": done, "total": total}:
                tags = {"stage": stage}
                self._units.inc(1, tags)
                self._left.set(total - done, tags)
                for counter, name in ((self._seconds, "seconds"), (self._bytes, "bytes")):
                    # Ray refuses increments of 0
                    if (amount := event.get(name, 0)) > 0:
                        counter.inc(amount, tags)
            case {"event": "stage", "state": "end", "stage": stage, "seconds": seconds}:
                self._stage_seconds.inc(max(seconds, 1e-9), {"stage": stage})
            case {"event": "lost" | "failed", "cause": cause, "decided": decided}:
                self._failures.inc(1, {"cause": cause, "decided": decided})
        self._workers.set(status.get("workers") or 0)
