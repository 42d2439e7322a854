"""History of one run under faults."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.stage_names import VERIFY


@dataclass(frozen=True, slots=True)
class Fault:
    """Kind and moment of a fault."""

    kind: str
    stage: str
    fraction: float
    """Fraction of the stage's units that are done."""

    def is_due(self, event: Mapping[str, Any]) -> bool:
        if event.get("stage") != self.stage:
            return False
        if event["event"] == "stage":
            return self.fraction == 0 and event["state"] == "begin"
        return bool(event["event"] == "unit" and event["done"] >= self.fraction * event["total"])


class FaultHistory:
    """History of a run over its drivers: faults, and events since."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.waiting = list(faults)
        self.happened: list[dict[str, Any]] = []
        self.life = 0
        self._told: set[tuple[str, int]] = set()
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def note(self, event: Mapping[str, Any]) -> None:
        """Count a unit that is reported again as redone, because of the last fault."""
        if event["event"] in ("lost", "retired"):
            for each in self.happened:
                each["noticed"] = True
        if event["event"] != "unit" or event["stage"] == VERIFY:
            return
        for each in self.happened:
            if each["noticed"] or each["life"] < self.life:
                each.setdefault("recovered", self.seconds - each["at"])
        unit = event["stage"], event["done"]
        if unit in self._told:
            self.happened[-1]["redone"] += 1
        self._told.add(unit)

    def due(self, event: Mapping[str, Any]) -> Fault | None:
        """Return the fault due at this event, if any."""
        return next((each for each in self.waiting if each.is_due(event)), None)

    def met(self, fault: Fault) -> None:
        """Record that a fault has happened."""
        self.waiting.remove(fault)
        now = {"at": self.seconds, "life": self.life, "noticed": False, "redone": 0}
        self.happened.append(asdict(fault) | now)
