"""When a submitted job is worth another attempt: pure, so that it is tested without Ray."""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import InfeasibleError, InputError, StoppedError, UsageError

FINAL = {UsageError.exit_code, InfeasibleError.exit_code, InputError.exit_code, 126, 127}
"""Exit codes that another attempt would end with too: what was asked is wrong, not the machines.
The last two are the shell's, for a program that is not there."""
FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 60.0


class State(StrEnum):
    """What an attempt has come to."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "was stopped"
    LOST = "is unknown to the cluster, which must have been started anew"


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    state: State
    driver_exit_code: int | None = None
    """The program's own; negative for a signal, none if its node went before it could end."""
    message: str = ""

    @property
    def exit_code(self) -> int:
        """The program's, as a shell would give it; what took it away leaves it to be resumed."""
        if self.state is State.SUCCEEDED:
            return 0
        if self.state is not State.FAILED or self.driver_exit_code is None:
            return StoppedError.exit_code
        code = self.driver_exit_code
        return code if code >= 0 else 128 - code

    @property
    def text(self) -> str:
        """One line: the state, the exit code, and what Ray says where there is none."""
        if self.state is not State.FAILED:
            return self.state.value
        if self.driver_exit_code is not None:
            return f"{self.state.value} with exit code {self.exit_code}"
        return f"{self.state.value} without an exit code: {' '.join(self.message.split())[:300]}"


def seconds_to_next(end: End, failures: int, retries: int) -> float | None:
    """Seconds to wait before the next attempt; none if there is to be no other.

    What succeeded, was stopped by somebody, or would fail the same way ends here. Everything else
    (a driver that was killed, a head or its node that went, a run that was stopped or that lost
    too many workers) is tried again, since a run resumes where it was left. A fault in the code
    looks no different from outside and costs the retries.

    Args:
        end: How the last attempt ended.
        failures: Attempts that have failed, this one included.
        retries: Attempts allowed after the first.
    """
    if end.state in (State.SUCCEEDED, State.STOPPED) or end.exit_code in FINAL:
        return None
    if failures > retries:
        return None
    return min(FIRST_WAIT_SECONDS * 2.0 ** (failures - 1), LONGEST_WAIT_SECONDS)
