"""The errors this package raises on purpose, each with the exit code it ends a command with.

A message says where, what was found, what is allowed and what to do, in one line. Every error
takes one positional message and keeps pickle's default protocol working, so that it crosses Ray
processes as itself.
"""


class OrchestratorError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(OrchestratorError):
    """A flag, recipe field or argument is wrong; nothing was started."""

    exit_code = 2


class InfeasibleError(OrchestratorError):
    """What was asked cannot be met: by any plan under the budget, or by the machines at hand."""

    exit_code = 3


class InputError(OrchestratorError):
    """A model, checkpoint, run directory or text is missing, damaged or not supported."""

    exit_code = 4


class StoppedError(OrchestratorError):
    """The run was asked to stop; what is committed stays, and the same command resumes it."""

    exit_code = 75


class WorkerError(OrchestratorError):
    """A unit failed on its worker for a reason that is not the input's; carries the traceback."""
