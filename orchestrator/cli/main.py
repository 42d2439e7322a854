"""Command line: maps arguments to calls of `orchestrator.api`, results to text, errors to codes.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or
data invalid, 75 stopped and resumable, 1 other. Heavy packages are imported only when a command
runs.
"""

import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from orchestrator.cli.stopping import stoppable
from orchestrator.errors import InputError, OrchestratorError, StoppedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong arguments raise SystemExit(2)."""
    # imports of a part of a second, in which a keyboard interrupt is one line too
    with stoppable(""):
        from orchestrator.cli.parser import make_parser
        from orchestrator.cli.verbs import VERBS
    options = make_parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        _check_directory()
        exit_code = VERBS[options.command].run(options) or 0
        print(end="", flush=True)
        return exit_code
    except KeyboardInterrupt:
        return _complain("stopped by the keyboard", StoppedError.exit_code, options.verbose)
    except OrchestratorError as error:
        return _complain(str(error), error.exit_code, options.verbose)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            return 1
        return _complain(str(error), 1, options.verbose)
    finally:
        # after a stopped run the signal stays ignored
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, previous)


def _check_directory() -> None:
    """Refuse a working directory that was removed: libraries then end the process themselves."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the working directory was removed; change to another one") from error


def _is_reader_gone() -> bool:
    """Test if stdout is a pipe whose reader has ended, as with `head`; it is then ignored."""
    poll, stdout = select.poll(), sys.stdout.fileno()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # the interpreter flushes once more when it exits
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError(f"stopped by {signal.Signals(number).name}")


def _complain(message: str, exit_code: int, verbose: bool) -> int:
    first, *more = message.strip().splitlines() or ["no message"]
    if verbose:
        traceback.print_exc()
    elif more:
        first += " (--verbose shows the rest)"
    print(f"orchestrator: error: {first}", file=sys.stderr)
    return exit_code
