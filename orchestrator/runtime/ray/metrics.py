"""A run's events as metrics of the Ray cluster, for Prometheus to read where it reads Ray's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Counter, Gauge

from orchestrator.runtime.monitor import RunMonitor

PREFIX = "orchestrator_"


class Metrics:
    """Counters and gauges that follow a run's events; Ray shows them as `ray_orchestrator_...`.

    They are those of this driver: of a run that is taken up again they begin anew, as a process's
    metrics do.
    """

    def __init__(self) -> None:
        self._units = Counter(
            f"{PREFIX}units", description="Units of work that were done.", tag_keys=("stage",)
        )
        self._seconds = Counter(
            f"{PREFIX}unit_seconds",
            description="Seconds that workers spent on them, all workers together.",
            tag_keys=("stage",),
        )
        self._bytes = Counter(
            f"{PREFIX}unit_bytes", description="Bytes that they committed.", tag_keys=("stage",)
        )
        self._stage_seconds = Counter(
            f"{PREFIX}stage_seconds",
            description="Wall time of the stages that have ended.",
            tag_keys=("stage",),
        )
        self._failures = Counter(
            f"{PREFIX}failures",
            description="Calls that failed, by what was the cause and what was done about it.",
            tag_keys=("cause", "decided"),
        )
        self._left = Gauge(
            f"{PREFIX}units_left",
            description="Units that are still to be done.",
            tag_keys=("stage",),
        )
        self._workers = Gauge(f"{PREFIX}workers", description="Workers that are there.")

    @contextmanager
    def following(self, monitor: RunMonitor) -> Iterator[None]:
        """Follows a run's events for a while."""
        try:
            with monitor.followed(self.note):
                yield
        finally:
            self._workers.set(0)

    def note(self, event: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Follows one event.

        Args:
            status: Of the run, once it knows of the event.
        """
        match event:
            case {"event": "unit", "stage": stage, "done": done, "total": total}:
                tags = {"stage": stage}
                self._units.inc(1, tags)
                self._left.set(total - done, tags)
                for counter, name in ((self._seconds, "seconds"), (self._bytes, "bytes")):
                    # Ray refuses to count nothing
                    if (amount := event.get(name, 0)) > 0:
                        counter.inc(amount, tags)
            case {"event": "stage", "state": "end", "stage": stage, "seconds": seconds}:
                self._stage_seconds.inc(max(seconds, 1e-9), {"stage": stage})
            case {"event": "lost" | "failed", "cause": cause, "decided": decided}:
                self._failures.inc(1, {"cause": cause, "decided": decided})
        self._workers.set(status.get("workers") or 0)
