"""Progress events of a run, from a thread: calls of minutes block the driver of a local run."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.progress.eta import (
    Estimate,
    Expected,
    Moment,
    forecast_of_work,
    later_seconds,
    run_ratio,
    stage_left,
)
from orchestrator.progress.tally import Ahead, Counted, StageTally, Tally

SECONDS = 1.0
"""Interval between progress events."""
NAMED_CALLS = 3
"""Running calls that an event names."""


class Progress:
    """Progress of the stages of a run; reports it from a thread while a stage has calls.

    Args:
        report: Called with each event, from the thread. Errors of storage are ignored here, since
            the driver meets them too; any other one ends the thread, and is raised by `check`.
        within: Returns the name of the present stage, or "".
    """

    def __init__(
        self,
        report: Callable[[dict[str, Any]], None],
        within: Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._within, self._clock = report, within, clock
        self.expected = Expected()
        """Forecast of the run; empty if there is none."""
        self._stages: dict[str, StageTally] = {}
        self._begun: dict[str, float] = {}
        self._shown: dict[str, tuple[Counted, float]] = {}
        """By stage, the last count, and the largest fraction that was reported."""
        self._measured: dict[str, tuple[float, float]] = {}
        """By ended stage, its seconds and the forecast of the work that was done in it."""
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.wait(SECONDS):
            try:
                with suppress(OSError, OrchestratorError):
                    if (event := self.event()) is not None:
                        self._report(event)
            except Exception as error:
                self._error = error
                return

    def check(self) -> None:
        """Raise the error by which a report has ended the thread."""
        if (error := self._error) is not None:
            self._error = None
            raise error

    def tally(self, stage: str, ahead: Ahead | None = None) -> Tally:
        """Return the tally of the next dispatch of a stage.

        Args:
            ahead: Work of the stage after this dispatch.
        """
        tally = Tally(ahead or Ahead(), clock=self._clock)
        if stage not in self._stages:
            self._stages[stage], self._begun[stage] = StageTally(), self._clock()
        self._stages[stage].open(tally)
        return tally

    def end(self, stage: str) -> None:
        """Record the end of a stage; a later one of its name begins anew."""
        found = self._stages.pop(stage, None)
        begun = self._begun.pop(stage, self._clock())
        self._shown.pop(stage, None)
        moment = found.moment() if found is not None else None
        if moment is not None:
            forecast = forecast_of_work(moment, self._units(stage), 1.0)
            if forecast is not None:
                before = self._measured.get(stage, (0.0, 0.0))
                spent = self._clock() - begun
                self._measured[stage] = before[0] + spent, before[1] + forecast

    def _units(self, stage: str) -> Mapping[str, float]:
        return self.expected.units.get(stage, {})

    def _ratio(self, measured: float = 0.0, forecast: float = 0.0) -> float:
        """Ratio of time to forecast, with what was measured in the present stage."""
        seconds = measured + sum(each for each, _ in self._measured.values())
        expected = forecast + sum(each for _, each in self._measured.values())
        return run_ratio(seconds, expected, self.expected)

    def event(self) -> dict[str, Any] | None:
        """Return the progress of the present stage; None if it has no calls."""
        stage = self._within()
        tally = self._stages.get(stage)
        moment = tally.moment() if tally is not None else None
        counted = tally.counted() if tally is not None else None
        if moment is None or counted is None:
            return None
        found = stage_left(moment, self._units(stage), self._ratio())
        running = [
            {"call": call.label, "seconds": round(call.seconds, 1)}
            for call in moment.running[:NAMED_CALLS]
        ]
        return {
            "event": "progress",
            "stage": stage,
            "done": counted.done,
            "total": counted.total,
            "of": counted.of,
            "fraction": self._fraction(stage, counted, found.fraction),
            "left": None if found.left is None else round(found.left, 1),
            "run_left": self._run_left(stage, moment, found),
            "running": running,
        }

    def _fraction(self, stage: str, counted: Counted, found: float | None) -> float | None:
        """Fraction to report: it falls only if work was lost, not because costs were corrected."""
        if found is None:
            return None
        before, largest = self._shown.get(stage, (counted, 0.0))
        is_lost = before.of == counted.of and counted.done < before.done
        shown = found if is_lost else max(found, largest)
        self._shown[stage] = counted, shown
        return round(shown, 4)

    def _run_left(self, stage: str, moment: Moment, found: Estimate) -> float | None:
        later = later_seconds(stage, self.expected)
        if later is None or found.left is None:
            return None
        measured, forecast = self._clock() - self._begun.get(stage, self._clock()), 0.0
        work = forecast_of_work(moment, self._units(stage), found.fraction)
        if work is None:
            measured = 0.0
        else:
            forecast = work
        return round(found.left + later * self._ratio(measured, forecast), 1)
