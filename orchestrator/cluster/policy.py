"""What a lost worker means: pure, so that it is tested without a cluster."""

from collections import Counter

from orchestrator.errors import WorkerError

LOSSES_A_RUN = 50
LOSSES_A_UNIT = 3
MISSES_A_UNIT = 3


class FailurePolicy:
    """Counts losses and says when to give up; until then lost calls are performed again.

    A call that takes its worker down again and again is taken to be the cause: three times ends
    the run with its name. Fifty losses in one run mean that the machines are not fit for it. An
    input that is gone again and again after it was made means that its storage does not hold.
    """

    def __init__(self, *, a_run: int = LOSSES_A_RUN, a_unit: int = LOSSES_A_UNIT) -> None:
        self._a_run = a_run
        self._a_unit = a_unit
        self._losses: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()

    @property
    def losses(self) -> int:
        return self._losses.total()

    def after_loss(self, unit: str, why: str) -> None:
        """Notes a loss.

        Raises:
            WorkerError: It was one too many.
        """
        self._losses[unit] += 1
        if self._losses[unit] >= self._a_unit:
            raise WorkerError(
                f"{unit}: lost its worker {self._losses[unit]} times, at most "
                f"{self._a_unit - 1} are repeated; the last time: {why}; what is committed stays"
            )
        if self.losses >= self._a_run:
            raise WorkerError(
                f"{self.losses} workers lost in one run, at most {self._a_run - 1} are replaced; "
                f"the last time: {why}; what is committed stays, the same command resumes"
            )

    def after_missing(self, unit: str) -> None:
        """Notes that what a call was to read is not there, or is damaged.

        Raises:
            WorkerError: It was one too many.
        """
        self._misses[unit] += 1
        if self._misses[unit] >= MISSES_A_UNIT:
            raise WorkerError(
                f"{unit}: its input was made {self._misses[unit] - 1} times and is missing or "
                "damaged again; do all nodes share the run directory, and does its disk keep "
                "what is written?"
            )
