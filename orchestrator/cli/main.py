"""Command line: maps arguments to calls of `orchestrator.api`, results to text, errors to codes.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or
data invalid, 75 stopped and resumable, 1 other. Heavy packages are imported only when a command
runs.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.cli.clean import clean_run
from orchestrator.cli.lines import JsonLines, Lines
from orchestrator.cli.methods import print_methods
from orchestrator.cli.parser import FIELDS, HELD_OUT, make_parser
from orchestrator.cli.results import kept_rows, print_evaluation
from orchestrator.errors import OrchestratorError, StoppedError, UsageError
from orchestrator.plan.result import Result
from orchestrator.readable import duration
from orchestrator.recipe.recipe import (
    SIZE_FIELDS,
    Recipe,
    make_recipe,
    override,
    read_recipe_fields,
)
from orchestrator.recipe.values import parse_option, parse_vary
from orchestrator.usage import Usage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong arguments raise SystemExit(2)."""
    options = make_parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        code: int | None = COMMANDS[options.command](options)
        return code or 0
    except KeyboardInterrupt:
        return _complain("stopped by the keyboard", StoppedError.exit_code, options.verbose)
    except OrchestratorError as error:
        return _complain(str(error), error.exit_code, options.verbose)
    except OSError as error:
        return _complain(str(error), 1, options.verbose)
    finally:
        # after a stopped run the signal stays ignored
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError(f"stopped by {signal.Signals(number).name}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Exit with 75 on SIGTERM and SIGINT also before the run has started.

    During these seconds packages are imported and the model is located. No cleanup is needed yet,
    and imports would convert an exception into another one, so the process exits immediately. After
    a run was stopped, signals are ignored until the exit.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    except StoppedError:
        previous = dict.fromkeys(numbers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"orchestrator: error: stopped by {name} before the run began\n"
    os.write(sys.stderr.fileno(), line.encode())
    os._exit(StoppedError.exit_code)


def _complain(message: str, exit_code: int, verbose: bool) -> int:
    first, *more = message.strip().splitlines() or ["no message"]
    if verbose:
        traceback.print_exc()
    elif more:
        first += " (--verbose shows the rest)"
    print(f"orchestrator: error: {first}", file=sys.stderr)
    return exit_code


def _recipe(options: argparse.Namespace) -> Recipe:
    """Make the recipe from a file and the flags; flags take precedence."""
    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    written = read_recipe_fields(options.recipe) if "recipe" in options else {}
    for text in vars(options).get("option", ()):
        name, option, value = parse_option(text)
        table = written.get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"option {text}: {name} is a field of the recipe, not a table")
        written[name] = {**table, option: value}
    preset = {"preset": options.preset} if "preset" in options else {}
    return make_recipe({**override(written, given), **preset})


def _plan(options: argparse.Namespace) -> int:
    from orchestrator import api
    from orchestrator.errors import InfeasibleError
    from orchestrator.forecast import text

    names = ("gpus", "gpu", "gpu_memory", "host_memory", "price", "rates")
    given = {name: getattr(options, name) for name in names if name in options}
    if "rates" in given and "gpu" in given:
        raise UsageError("--gpu names a GPU and --rates a measured machine; give one of them")
    options.out = "planned"
    found = api.plan(_recipe(options), **given)
    print(json.dumps(found.to_json(), indent=2) if options.json else "\n".join(text.lines(found)))
    return InfeasibleError.exit_code if found.infeasible else 0


def _measure(options: argparse.Namespace) -> None:
    from orchestrator import api

    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    print(api.measure(options.output, **given))


def _compress(options: argparse.Namespace) -> None:
    from orchestrator import api

    sizes = _sizes(options)
    recipe = _recipe(options)
    if not sizes:
        with _stoppable():
            result = api.compress(recipe, on_event=_progress(options))
        _print_result(result, options.json)
        return
    with _stoppable():
        results = api.compress_sizes(recipe, sizes, on_event=_progress(options))
    if options.json:
        print(json.dumps([result.report for result in results], indent=2))
    else:
        for result in results:
            _print_result(result, as_json=False)


def _sizes(options: argparse.Namespace) -> tuple[float, ...]:
    """Return the sizes if several are given; the option is set to the first one."""
    for name in SIZE_FIELDS:
        sizes = getattr(options, name, None)
        if isinstance(sizes, tuple):
            setattr(options, name, sizes[0])
            return sizes
    return ()


def _retarget(options: argparse.Namespace) -> None:
    from orchestrator import api

    given = {name: value for name, value in vars(options).items() if name in {*FIELDS} - {"out"}}
    with _stoppable():
        result = api.retarget(options.run, options.out, on_event=_progress(options), **given)
    _print_result(result, options.json)


def _search(options: argparse.Namespace) -> None:
    from orchestrator import api

    recipe, vary = _recipe(options), dict(map(parse_vary, options.vary))
    given = {name: getattr(options, flag) for name, flag in HELD_OUT.items() if flag in options}
    given |= {"sequence_length": recipe.sequence_length}
    with _stoppable():
        found = api.search(recipe, vary, on_event=_progress(options), **given)
    if not options.json:
        for candidate in found.candidates:
            setting = ", ".join(f"{name}={value}" for name, value in candidate.setting.items())
            mark = "  best" if candidate is found.best else ""
            print(f"{candidate.perplexity:12.2f}  {candidate.kept:.4f}  {setting}{mark}")
    _print_result(found.result, options.json)


def _print_result(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.report, indent=2))
        return
    kept, values = result.report["kept"], result.report["values"]
    _print_rows(
        {
            **kept_rows(result.report),
            "kept fraction of the whole model": f"{kept['model']:.4f}",
            "parameters": f"{values['model_before']:,} before, {values['model_after']:,} after",
            "checkpoint": result.out,
            "run directory": result.run_dir,
        }
    )


def _evaluate(options: argparse.Namespace) -> None:
    from orchestrator import api

    taken = vars(options).keys() - {"command", "json", "model", "progress", "verbose"}
    arguments = {name: getattr(options, name) for name in taken}
    with _stoppable():
        report = api.evaluate(options.model, on_event=_progress(options), **arguments)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_evaluation(report)


def _verify(options: argparse.Namespace) -> int:
    from orchestrator import api
    from orchestrator.errors import InputError

    names = ("against", "linears")
    found = api.verify(options.out, **{n: getattr(options, n) for n in names if n in options})
    problems = found["problems"]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for problem in problems:
            print(f"wrong: {problem}")
        for note in found.get("notes", ()):
            print(f"note: {note}")
        if {"files", "tensors", "linears", "logits"} <= found.keys():
            _print_verification(found)
    return InputError.exit_code if problems else 0


def _print_verification(found: Mapping[str, Any]) -> None:
    files, linears, logits = found["files"], found["linears"], found["logits"]
    states = {state: list(files.values()).count(state) for state in files.values()}
    errors = [each["error"] for each in linears.values() if "error" in each]
    beside = f", |W - W'|²/|W|² up to {max(errors):.4f}" if errors else ""
    kl = (
        f", mean KL divergence from the dense model {logits['kl']:.4f} nats"
        if "kl" in logits
        else ""
    )
    _print_rows(
        {
            "files": ", ".join(f"{count} {state}" for state, count in states.items()),
            "tensors": f"{found['tensors']} read",
            "linears": f"{len(linears)} reconstructed{beside}",
            "logits": f"{'finite' if logits['finite'] else 'not finite'}{kl}",
        }
    )


def _export(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.export(options.out, options.dense_dir, format=options.format))


def _status(options: argparse.Namespace) -> None:
    from orchestrator import api

    status = api.status(options.run)
    if options.json:
        print(json.dumps(status, indent=2))
        return
    shown = {"run": options.run, **status}
    for name in ("started", "updated"):
        if name in shown:
            shown[name] = f"{duration(max(time.time() - shown[name], 0.0))} ago"
    if "done" in shown and "total" in shown:
        shown["done"] = f"{shown['done']} of {shown.pop('total')}"
    if "left" in shown:
        shown["left"] = f"about {duration(shown['left'])}"
    if "memory" in shown:
        shown["memory"] = Usage.from_json(shown["memory"])
    _print_rows(shown)


def _report(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.report(options.run, vars(options).get("output")))


def _compare(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.compare(options.runs, vars(options).get("output")))


def _submit(options: argparse.Namespace) -> int:
    from orchestrator import api

    program = make_parser().parse_args(options.program)
    if program.command == "submit":
        raise UsageError("submit: the job's command cannot be submit itself")
    written = read_recipe_fields(program.recipe) if "recipe" in program else {}
    for name in ("out", "run_dir"):
        path = vars(program).get(name) or written.get(name) or "/"
        if isinstance(path, str) and "://" not in path and not Path(path).is_absolute():
            raise UsageError(
                f"{name}: {path} would be in the job's own directory and be removed with it; "
                "give an absolute path that all nodes can access"
            )
    names = ("address", "retries", "working_dir", "exclude")
    given = {name: getattr(options, name) for name in names if name in options}
    given["env"] = dict(map(_variable, vars(options).get("env", ())))
    if options.no_wait and "retries" in given:
        raise UsageError("--retries: cannot be used with --no-wait, which does not watch the job")
    with _stoppable():
        return api.submit(
            options.program,
            wait=not options.no_wait,
            say=partial(print, file=sys.stderr, flush=True),
            **given,
        )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--env {text}: must be NAME=VALUE")
    return name, value


def _progress(options: argparse.Namespace) -> Lines | JsonLines:
    return JsonLines(sys.stderr) if options.progress == "json" else Lines(sys.stderr)


def _print_rows(rows: Mapping[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "methods": print_methods,
    "plan": _plan,
    "measure": _measure,
    "compress": _compress,
    "retarget": _retarget,
    "search": _search,
    "evaluate": _evaluate,
    "verify": _verify,
    "export": _export,
    "status": _status,
    "report": _report,
    "compare": _compare,
    "clean": clean_run,
    "submit": _submit,
}
"""Implementation of each command of `parser`."""
