"""Live display of a run on a terminal: a bar of the present stage, and lines above it."""

import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.cli.lines import Lines
from orchestrator.cli.sentences import LONG_SECONDS, sentence
from orchestrator.events import Event
from orchestrator.readable import counted, duration
from orchestrator.usage import Usage

FRAMES_A_SECOND = 2.0


class LiveDisplay(Lines):
    """Lines of notes, failures and ended stages, and below them the present stage.

    The display begins with the first stage: before it a signal ends the process at once, which
    would leave the terminal without its cursor.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock=clock)
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._units: Event | None = None

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def remind(self) -> None:
        if self._live is None:
            super().remind()

    def __call__(self, event: Event) -> None:
        if self._live is None and event["event"] == "stage":
            self._live = Live(
                get_renderable=self.frame,
                console=self._console,
                refresh_per_second=FRAMES_A_SECOND,
                transient=True,
            )
            self._live.start()
        super().__call__(event)

    def _write(self, text: str) -> None:
        if self._live is None:
            super()._write(text)
            return
        self._written = self._clock()
        self._console.print(f"[{duration(self._written - self._start)}] {text}")
        # else the stage before stays below the line until the next frame
        self._live.refresh()

    def _text(self, event: Event) -> str | None:
        super()._text(event)
        match event:
            case {"event": "unit"}:
                self._units = event
                return None
            case {"event": "progress"}:
                return None
            case {"event": "stage", "state": "begin"}:
                self._units = None
                return None
        return sentence(event)

    def frame(self) -> RenderableType:
        """Return the present stage as text: its bar, counts and times, and the run's.

        Takes no lock: the display calls it with its own lock held, which a line that is written
        waits for with the lock of events held.
        """
        within, known = self._within, self._progress
        stage = within[-1] if within else ""
        units, doing, since = self._units, self._doing, self._since
        elapsed = duration(self._clock() - since)
        if not stage:
            return Text(f"{doing}, for {elapsed}" if doing else "", overflow="ellipsis")
        if known is None or known["stage"] != stage:
            return Text(f"{doing}, for {elapsed}", overflow="ellipsis", no_wrap=True)
        rows: list[RenderableType] = [_bar(stage, known)]
        rows += map(_line, [_counts(known, units), _times(known), *_resources(known)])
        return Group(*rows)


def _line(text: str) -> Text:
    return Text(text, overflow="ellipsis", no_wrap=True)


def _bar(stage: str, known: Event) -> Table:
    """Name of a stage, its bar, and the percentage."""
    fraction = known["fraction"]
    if fraction is None:
        fraction = known["done"] / max(known["total"], 1)
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(stage, ProgressBar(total=1.0, completed=fraction), f"{fraction:.0%}")
    return grid


def _counts(known: Event, units: Event | None) -> str:
    """Count of the stage, and the last unit that was committed."""
    text = f"{known['done']} of {known['total']} {known['of']}"
    if units is not None and units["stage"] == known["stage"]:
        last = f", last {units['unit']}" if "unit" in units else ""
        text += f"; {units['done']} of {units['total']} committed{last}"
    return text


def _times(known: Event) -> str:
    left, run_left = known["left"], known["run_left"]
    if left is None:
        return "time left: not known yet"
    run = "" if run_left is None else f"; run: about {duration(run_left)}"
    return f"left: about {duration(left)}{run}"


def _resources(known: Event) -> list[str]:
    """Workers, failures and memory; the longest call, if it is long."""
    workers, failures = known.get("workers"), known.get("failures", 0)
    parts = [] if not workers else [counted(workers, "worker")]
    parts += [counted(failures, "failure")] if failures else []
    used: Any = known.get("memory")
    parts += [f"memory of a worker {Usage.from_json(used)}"] if used else []
    found = [", ".join(parts)] if parts else []
    for call in known.get("running", ())[:1]:
        if call["seconds"] >= LONG_SECONDS:
            found.append(f"{call['call']}, for {duration(call['seconds'])}")
    return found
