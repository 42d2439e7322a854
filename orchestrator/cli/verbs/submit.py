"""`submit`: a command as a Ray job."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.cli.flags import add_verb
from orchestrator.cli.stopping import stoppable
from orchestrator.errors import UsageError
from orchestrator.recipe.recipe_file import read_recipe_fields


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "submit", "run a command as a Ray job, with retries")
    parser.usage = "%(prog)s [options] -- COMMAND ..."
    parser.add_argument(
        "program", metavar="COMMAND", nargs="+", help="compress or another, with its arguments"
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="dashboard, http://HEAD:8265 (default: the one that Ray finds)",
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=int,
        help="attempts after the first, for errors other than those of the command (default: 3)",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="directory to upload with the job (default: .)"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="files not to upload, besides .venv, .work, .git and those in .gitignore; "
        "may be repeated",
    )
    parser.add_argument(
        "--env",
        action="append",
        metavar="NAME=VALUE",
        help="environment variable of the job; may be repeated",
    )
    parser.add_argument(
        "--no-wait",
        action="store_true",
        default=False,
        help="print the submission id and exit",
    )


def run(options: argparse.Namespace) -> int:
    from orchestrator import api

    program = options.parse(options.program)
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
    with stoppable():
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
