"""`orchestrator submit`: a command as a Ray job, with retries after failures that may pass."""

import asyncio
import logging
import os
import secrets
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from orchestrator.errors import StoppedError, UsageError
from orchestrator.readable import size
from orchestrator.runtime.ray.cluster import UPLOAD_BYTES, sizes_of_upload
from orchestrator.runtime.ray.reasons import first_line
from orchestrator.runtime.ray.submit_policy import End, State, seconds_to_next
from orchestrator.runtime.signals import Signals

PACKAGE = "orchestrator"
EXCLUDES = (".venv", ".work", ".git")
"""Paths of a working directory that are not uploaded, besides those in its `.gitignore`."""
PATIENCE_SECONDS = 600.0
"""Time for which a head may not answer; a new one takes minutes to start."""
SILENCE_SECONDS = 60.0
"""Time without output after which a log is opened again: a connection can break silently."""
POLL_SECONDS = 1.0
SAY_SECONDS = 30.0
STOP_SECONDS = 20.0
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray prefers to a given address."""
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
"""Loggers of Ray that report each package, connection and excluded directory."""

Say = Callable[[str], None]
T = TypeVar("T")


def submit(
    program: Sequence[str],
    *,
    address: str | None,
    retries: int,
    working_dir: str,
    exclude: Sequence[str],
    env: Mapping[str, str],
    wait: bool,
    show: Say,
    say: Say,
) -> int:
    """Run an orchestrator command as a Ray job and follow it. Returns the program's exit code.

    After a failure that may pass (see `submit_policy`) another attempt with its own submission id
    resumes the run. SIGINT and SIGTERM stop the job. The arguments are those of
    `orchestrator.api.submit`.

    Raises:
        UsageError: The directory is too large, nothing answers at the address, it denies access,
            or it refuses the job.
        StoppedError: A signal was received, or the head did not answer for too long.
    """
    environment = {"working_dir": working_dir, "excludes": [*EXCLUDES, *exclude]}
    check_upload(Path(working_dir), environment["excludes"])
    with Signals(lambda name: None) as signals:
        job = _Job(program, {**environment, "env_vars": dict(env)}, say, signals)
        try:
            job.connect(address)
            if not (Path(working_dir) / PACKAGE / "__init__.py").is_file():
                say(
                    f"{Path(working_dir).absolute()} has no package {PACKAGE}: the job runs the "
                    "version that is installed on the nodes; to run that of a checkout, submit "
                    "from there, or give its path as --working-dir"
                )
            for attempt in range(1, retries + 2):
                job.submit(attempt, retries + 1)
                if not wait:
                    show(f"{job.id}\n")
                    say(f"`ray job logs --address {job.address} --follow {job.id}` shows its log")
                    return 0
                end = job.follow(show)
                seconds = seconds_to_next(end, attempt, retries)
                if seconds is None:
                    break
                say(f"{job.id}: {end.text}; the next attempt is in {seconds:g} s")
                time.sleep(seconds)
            say(f"{job.id}: {end.text}")
            return end.exit_code
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped by {signals.received}; {job.stop()}; what is committed stays, "
                "the same command resumes"
            ) from None


def check_upload(directory: Path, excludes: Sequence[str], limit: int = UPLOAD_BYTES) -> None:
    """Raise UsageError if a directory is too large for Ray; nothing is packed.

    Args:
        limit: Limit in bytes; Ray stores files uncompressed.
    """
    sizes = sizes_of_upload(directory, excludes)
    total = sum(sizes.values())
    if total < limit:
        return
    parts: Counter[str] = Counter()
    for path, count in sizes.items():
        parts[path.parts[0] + ("/" if len(path.parts) > 1 else "")] += count
    most = ", ".join(f"{name} ({size(count)})" for name, count in parts.most_common(3))
    raise UsageError(
        f"working_dir: {directory.absolute()} has {size(total)} to upload, and Ray takes less than "
        f"{size(limit)}; most is in {most}: leave that out with --exclude, or submit from another "
        "directory, --working-dir"
    )


class _Job:
    """Current attempt."""

    def __init__(
        self, program: Sequence[str], environment: Mapping[str, Any], say: Say, signals: Signals
    ) -> None:
        self._entrypoint = shlex.join(["python", "-m", "orchestrator", *program])
        self._environment = dict(environment)
        self._say = say
        self._signals = signals
        self._name = f"orchestrator-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.id = ""
        """Submission id; Ray accepts each only once."""

    def connect(self, address: str | None) -> None:
        """Raise UsageError if nothing answers at the address or access is denied."""
        for name in _ADDRESSES:
            theirs = os.environ.get(name)
            if address and theirs and theirs != address:
                raise UsageError(
                    f"address {address}: Ray would go to {name}={theirs} instead; unset {name}"
                )
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise _locked_out(address) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"address {address}: no Ray dashboard answers: {first_line(error)}; "
                "give http://HEAD:8265"
            ) from error
        self.address: str = self._client.get_address()

    def submit(self, attempt: int, attempts: int) -> None:
        """Submit an attempt under its own id."""
        self.id = f"{self._name}-{attempt}"
        self._shown = 0
        self._metadata = {"attempt": f"{attempt} of {attempts}"}
        self._ask(self._submit_unless_known)
        self._say(f"{self.id}: submitted to {self.address}, attempt {attempt} of {attempts}")

    def _submit_unless_known(self) -> None:
        # a head that accepted the job and then stopped answering must not get a second one
        if self._details() is not None:
            return
        try:
            # so that a signal finds either no job or one that can be stopped
            with self._signals.deferred():
                self._client.submit_job(
                    entrypoint=self._entrypoint,
                    submission_id=self.id,
                    runtime_env=self._environment,
                    metadata=self._metadata,
                )
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{self.address} refuses the job: {first_line(error)}") from error

    def follow(self, show: Say) -> End:
        """Show the log of the attempt until it ends."""
        while True:
            asyncio.run(self._show_log(show))
            self._signals.check()
            details = self._ask(self._details)
            if details is None:
                return End(State.LOST)
            if details.status.is_terminal():
                state = State[details.status.value]
                return End(state, details.driver_exit_code, details.message or "")
            time.sleep(POLL_SECONDS)

    async def _show_log(self, show: Say) -> None:
        pieces, position = self._client.tail_job_logs(self.id), 0
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    piece = await anext(pieces)
            except Exception:
                # the job's status tells why the log ended
                return
            if fresh := piece[max(self._shown - position, 0) :]:
                show(fresh)
            position += len(piece)
            self._shown = max(self._shown, position)

    def stop(self) -> str:
        """Stop the attempt. Returns its state in words."""
        if not self.id:
            return "nothing was submitted"
        try:
            if self._details() is None:
                return f"{self.id} was not submitted"
            self._say(f"{self.id}: is being stopped")
            self._client.stop_job(self.id)
            end = time.monotonic() + STOP_SECONDS
            while (found := self._details()) is not None and time.monotonic() < end:
                if found.status.is_terminal():
                    return f"{self.id} has ended as {found.status.value}"
                time.sleep(POLL_SECONDS)
        except (OSError, RayError, RuntimeError) as error:
            return f"{self.id} may go on, for its head does not answer: {first_line(error)}"
        return f"{self.id} was told to stop and may take a while"

    def _details(self) -> JobDetails | None:
        """Ray's record of the attempt; None if the head was restarted and has lost it."""
        jobs = self._client.list_jobs()
        return next((job for job in jobs if job.submission_id == self.id), None)

    def _ask(self, question: Callable[[], T]) -> T:
        """Retry while the head does not answer, for `PATIENCE_SECONDS`, with messages."""
        begun = said = time.monotonic()
        while True:
            try:
                return question()
            except AuthenticationError as error:
                raise _locked_out(self.address) from error
            except (OSError, RuntimeError) as error:
                now, why = time.monotonic(), f"{type(error).__name__}: {first_line(error)}"
            if now - begun > PATIENCE_SECONDS:
                raise StoppedError(
                    f"{self.address} has not answered for {PATIENCE_SECONDS:g} s: {why}; if "
                    f"{self.id} is gone with it, the same command resumes on another cluster"
                )
            if now - said >= SAY_SECONDS or said == begun:
                self._say(f"{self.id}: {self.address} does not answer, is asked again")
                said = now
            time.sleep(POLL_SECONDS)


def _locked_out(address: str | None) -> UsageError:
    return UsageError(
        f"address {address}: the cluster asks for another token than is given here; "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    )
