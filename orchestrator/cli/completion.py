"""`completion`: script by which a shell completes verbs, flags, their values and paths."""

import argparse
from collections.abc import Iterator
from typing import Any

from orchestrator.cli.flags import add_verb

SHELLS = ("bash", "zsh", "tcsh")
PATHS = {"CHECKPOINT", "DENSE", "DENSE_DIR", "DIR", "FILE", "MODEL", "OUT", "RUN", "TEXT"}
"""Metavars of arguments that are completed with files and directories."""


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "completion", "print a script for completion in a shell")
    parser.add_argument("shell", choices=SHELLS, help="shell that reads the script")


def run(options: argparse.Namespace) -> None:
    """Print the script of the parser in `options.parser`."""
    import shtab

    for action in _actions(options.parser):
        if action.metavar in PATHS:
            vars(action)["complete"] = shtab.FILE
    print(shtab.complete(options.parser, options.shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
