"""Feed of a live page: one reader of the run directory, shared by all clients; it writes nothing.

The directory is read at intervals, while a client follows it or when a page is asked for. Each
section of the page remembers the number of events after which it changed, so that a client that was
away gets the sections that have changed since.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.errors import InputError, OrchestratorError
from orchestrator.pages.live.files import RunFiles
from orchestrator.pages.live.page import live_page, live_sections, page_title
from orchestrator.pages.live.state import RunState
from orchestrator.pages.markup import Markup
from orchestrator.pages.report import rendered_report
from orchestrator.store.files import is_missing
from orchestrator.store.journal import JournalTail
from orchestrator.store.lease import LEASE_FILE
from orchestrator.store.places import Place, Remote
from orchestrator.store.run import RunDirectory

DISK_SECONDS = 0.5
"""Interval between readings of a directory."""
STORE_SECONDS = 5.0
"""The same in an object store, where each reading costs some requests."""


def check_watchable(place: Place) -> None:
    """Raise InputError for a file or a directory that is no run; one that is missing may become it.

    Raises:
        UsageError: The bucket does not exist, or the store denies access.
    """
    if isinstance(place, Remote):
        place.check()
    run = RunDirectory(place)
    if run.marker.is_file():
        return
    beside = place.with_name(f"{place.name}.run")
    if RunDirectory(beside).marker.is_file():
        raise InputError(f"{place}: is not a run directory; its run directory is {beside}")
    is_other = place.is_dir() and any(not n.name.startswith(LEASE_FILE) for n in place.iterdir())
    if is_other or place.is_file():
        raise InputError(f"{place}: is not a run directory: it has no {run.marker.name}")


@dataclass(frozen=True, slots=True)
class LiveSection:
    """Section of the page, with its last change."""

    content: Markup
    events: int
    """Number of events of the journal when it changed."""
    revision: int
    """Number of the reading that changed it."""


class Change(NamedTuple):
    """Sections that a client does not have yet."""

    mark: str
    """Position in the journal, from which the client may go on after an interruption."""
    revision: int
    sections: dict[str, Markup]


class Feed:
    """State of a run and its page, kept up to date by a thread while clients follow."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._run = RunDirectory(place)
        self._interval = STORE_SECONDS if isinstance(place, Remote) else DISK_SECONDS
        self._tail = JournalTail(place)
        self._state, self._files = RunState(), RunFiles(place=str(place))
        self._sections: dict[str, LiveSection] = {}
        self._title, self._events = "", 0
        self._journal_id = secrets.token_hex(4)
        self._revision = 0
        self._read_at = float("-inf")
        self._report: tuple[str, Markup | None] = "", None
        self._reading, self._rendering = threading.Lock(), threading.Lock()
        self._changed = threading.Condition()
        self._followers = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal", daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()

    @property
    def is_closed(self) -> bool:
        return self._closing.is_set()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Count one more client, for which the directory is read at intervals."""
        with self._changed:
            self._followers += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._followers -= 1

    def page(self) -> Markup:
        """Return the page as it is now."""
        self.refresh()
        with self._changed:
            sections = {name: each.content for name, each in self._sections.items()}
            return live_page(sections, title=self._title, mark=self._mark)

    def since(self, mark: str) -> Change:
        """Return the sections that have changed since a mark; all if it is not of this journal.

        Sections that changed at the mark itself are included: the status may have changed
        afterwards, without an event.
        """
        self.refresh()
        journal, _, events = mark.partition("-")
        with self._changed:
            is_ours = journal == self._journal_id and events.isdecimal() and len(events) < 16
            first = int(events) if is_ours else 0
            return self._change(lambda each: each.events >= first)

    def wait(self, revision: int, seconds: float) -> Change | None:
        """Wait for changes after a revision; None if there are none within these seconds."""
        with self._changed:
            is_news = self._changed.wait_for(
                lambda: self._revision > revision or self.is_closed, timeout=seconds
            )
            if not is_news or self.is_closed:
                return None
            return self._change(lambda each: each.revision > revision)

    def report(self) -> Markup:
        """Return the report of the run as it is now; that of a run that is done is kept.

        Raises:
            InputError: The directory has no run of `compress` or result of `evaluate`, or one of
                its files is damaged.
        """
        self.refresh()
        with self._rendering:
            with self._changed:
                mark, is_done = self._mark, self._files.state == "done"
            known, content = self._report
            if content is None or known != mark or not is_done:
                content = rendered_report(self._place)
                self._report = mark, content
            return content

    def has_ended(self) -> bool:
        """Return True if the run is done and has a report, which then replaces the page.

        A search goes on after the run of a candidate.
        """
        with self._changed:
            files = self._files
            is_done = files.state == "done" and files.has_report and not files.is_candidate
        if not is_done:
            return False
        try:
            self.report()
        except OrchestratorError:
            return False
        return True

    def refresh(self) -> None:
        """Read the directory, unless that was done within the interval."""
        with self._reading:
            if time.monotonic() - self._read_at < self._interval:
                return
            self._read()
            self._read_at = time.monotonic()

    @property
    def _mark(self) -> str:
        return f"{self._journal_id}-{self._events}"

    def _change(self, is_included: Callable[[LiveSection], bool]) -> Change:
        found = {name: each.content for name, each in self._sections.items() if is_included(each)}
        return Change(self._mark, self._revision, found)

    def _follow(self) -> None:
        while not self.is_closed:
            with self._changed:
                self._changed.wait_for(lambda: self._followers > 0 or self.is_closed)
            self.refresh()
            self._closing.wait(self._interval)

    def _read(self) -> None:
        """Read journal, status and description, and compose the sections that they change."""
        files = self._read_files()
        try:
            begins_anew, events = self._tail.read()
        except (OSError, OrchestratorError) as error:
            begins_anew, events = False, []
            files = replace(files, problem=files.problem or str(error))
        if begins_anew:
            self._state, self._journal_id = RunState(), secrets.token_hex(4)
        for event in events:
            self._state.take(event)
        content, title = live_sections(self._state, files), page_title(self._state, files)
        with self._changed:
            self._files, self._title, self._events = files, title, self._state.events
            before = self._sections
            self._sections = {
                name: before[name]
                if name in before and before[name].content == each and not begins_anew
                else LiveSection(each, self._state.events, self._revision + 1)
                for name, each in content.items()
            }
            if self._sections != before:
                self._revision += 1
                self._changed.notify_all()

    def _read_files(self) -> RunFiles:
        """Read the small files; those of the last reading remain if one of them is damaged."""
        place = str(self._place)
        try:
            if is_missing(self._run.marker):
                return RunFiles(place=place)
            description, status = self._run.description(), self._run.status()
            return RunFiles(place=place, description=description, status=status)
        except (InputError, OrchestratorError, OSError) as error:
            last = self._files
            return RunFiles(
                place=place, description=last.description, status=last.status, problem=str(error)
            )
