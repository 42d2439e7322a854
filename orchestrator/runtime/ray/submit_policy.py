"""Decision on another attempt of a submitted job: pure, so that it is tested without Ray."""

import re
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import InfeasibleError, InputError, StoppedError, UsageError

FINAL = {UsageError.exit_code, InfeasibleError.exit_code, InputError.exit_code, 126, 127}
"""Exit codes that another attempt would repeat: the request is at fault, not the machines. The last
two are the shell's, for a program that does not exist."""
FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 60.0

SECRET = re.compile(r"SECRET|PASSWORD|(ACCESS|ACCOUNT|API)_KEY|SESSION_TOKEN|^(HF|.*_HUB)_TOKEN$")
"""Names of environment variables that are refused for a job, since it would display them."""


class State(StrEnum):
    """State of an attempt."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "was stopped"
    LOST = "is unknown to the cluster, which must have been started anew"


@dataclass(frozen=True)
class End:
    """End of an attempt."""

    state: State
    driver_exit_code: int | None = None
    """Exit code of the program; negative for a signal, None if its node was lost first."""
    message: str = ""

    @property
    def exit_code(self) -> int:
        """Exit code as a shell reports it; that of a stopped run if the program was lost."""
        if self.state is State.SUCCEEDED:
            return 0
        if self.state is not State.FAILED or self.driver_exit_code is None:
            return StoppedError.exit_code
        code = self.driver_exit_code
        return code if code >= 0 else 128 - code

    @property
    def text(self) -> str:
        """One line: state and exit code, or Ray's message if there is none."""
        if self.state is not State.FAILED:
            return self.state.value
        if self.driver_exit_code is not None:
            return f"{self.state.value} with exit code {self.exit_code}"
        return f"{self.state.value} without an exit code: {' '.join(self.message.split())[:300]}"


def seconds_to_next(end: End, failures: int, retries: int) -> float | None:
    """Seconds to wait before the next attempt; None if there is none.

    A job that succeeded, was stopped by a user, or would fail in the same way is not repeated. All
    other failures (a killed driver, a lost head or node, a run that was stopped or lost too many
    workers) are repeated, because a run resumes from its committed units. A fault in the code
    cannot be told from them and uses up the retries.

    Args:
        end: End of the last attempt.
        failures: Attempts that have failed, this one included.
        retries: Attempts allowed after the first.
    """
    if end.state in (State.SUCCEEDED, State.STOPPED) or end.exit_code in FINAL:
        return None
    if failures > retries:
        return None
    return min(FIRST_WAIT_SECONDS * 2.0 ** (failures - 1), LONGEST_WAIT_SECONDS)
