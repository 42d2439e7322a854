"""Presence of lm-evaluation-harness, and its command line with compressed models."""

import sys
from collections.abc import Sequence

from orchestrator.errors import UsageError


def check_installed() -> None:
    """Raise UsageError if lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "lm-evaluation-harness is not installed; pip install 'orchestrator[lm-eval]'"
        ) from error


def run_command_line(arguments: Sequence[str]) -> int:
    """Run the command line of lm-evaluation-harness in this process; returns its exit code.

    Raises:
        UsageError: It is not installed.
    """
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    # its parser reads and changes the arguments of the process
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
            return 1
        return exit.code or 0
    finally:
        sys.argv = before
    return 0
