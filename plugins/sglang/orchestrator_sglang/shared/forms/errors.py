# Copy of orchestrator/errors.py, by scripts/vendor_forms.py; change that file.
"""Errors that this package raises deliberately, each with the exit code of the command.

A message states in one line where, what was found, what is allowed and what to do. Every error has
one positional message and works with pickle's default protocol, so that it keeps its type between
Ray processes.
"""


class OrchestratorError(Exception):
    """Base class of all deliberate errors."""

    exit_code = 1


class UsageError(OrchestratorError):
    """A flag, recipe field or argument is wrong; no work was started."""

    exit_code = 2


class InfeasibleError(OrchestratorError):
    """The request cannot be met by any plan within the budget, or by the available machines."""

    exit_code = 3


class InputError(OrchestratorError):
    """A model, checkpoint, run directory or text is missing, damaged or not supported."""

    exit_code = 4


class StoppedError(OrchestratorError):
    """The run was asked to stop; committed units are kept, and the same command resumes it."""

    exit_code = 75


class WorkerError(OrchestratorError):
    """A unit failed on its worker for a reason other than its input; carries the traceback."""
