"""Parser of the command line."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from orchestrator.cli.verbs import VERBS
from orchestrator.recipe.values import TYPE_NAMES, brief, fraction
from orchestrator.version import version_lines

ALLOWED: dict[Any, str] = {**TYPE_NAMES, fraction: "a fraction such as 0.8"}
"""Description of the allowed values, by the type of a flag."""


class OneLineParser(argparse.ArgumentParser):
    """Parser that reports a wrong argument in one line, and names the help instead of printing
    the usage."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse_unknown(options.command, unknown[0])
        return options

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2; a missing argument gets a pointer to the help."""
        if message.startswith("argument "):
            message = message.removeprefix("argument ")
        else:
            message += f"; see {self.prog} --help"
        self.exit(2, f"orchestrator: error: {message}\n")

    def _refuse_unknown(self, command: str, argument: str) -> NoReturn:
        flags = _commands(self)[command]._option_string_actions
        name = argument.partition("=")[0]
        if name in flags:
            self.exit(2, f"orchestrator: error: {name} must follow the command {command}\n")
        near = difflib.get_close_matches(name, flags) if name.startswith("-") else []
        what = "unknown flag" if name.startswith("-") else "surplus argument"
        misses = f"; near misses: {', '.join(near)}" if near else ""
        self.exit(
            2,
            f"orchestrator: error: {what} {_plain(name)}{misses}; see "
            f"{self.prog} {command} --help\n",
        )

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            allowed = ALLOWED.get(action.type)
            if allowed is None:
                raise
            self._refuse_value(action, arg_string, allowed)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            near = difflib.get_close_matches(value, action.choices)
            hint = (
                f"near misses: {', '.join(near)}"
                if near
                else f"commands: {', '.join(action.choices)}"
            )
            self.error(f"unknown command {_plain(value)}; {hint}")
        self._refuse_value(action, value, f"one of {', '.join(map(str, action.choices))}")

    def _refuse_value(self, action: argparse.Action, value: Any, allowed: str) -> NoReturn:
        flag = "/".join(action.option_strings) or str(action.metavar or action.dest)
        self.error(f"argument {flag} {_plain(value)}: must be {allowed}")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; its result contains `command` and the given flags."""
    parser = OneLineParser(
        prog="orchestrator",
        description="Compresses large language models on a Ray cluster.",
        epilog="Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or data invalid, "
        "75 stopped and resumable, 1 other.",
    )
    parser.add_argument(
        "--version",
        action=VersionAction,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the versions of orchestrator, Python, ray, torch and transformers, and exit",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for verb in VERBS.values():
        verb.add_parser(commands)
    # the command of a job is checked before it is submitted
    commands.choices["submit"].set_defaults(parse=parser.parse_args)
    commands.choices["completion"].set_defaults(parser=parser)
    return parser


def _plain(value: Any) -> str:
    """Write a value as it was given, or quoted if it is empty, long or not one printable word."""
    text = str(value)
    return (
        text if text.isprintable() and len(text.split()) == 1 and len(text) < 100 else brief(text)
    )


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of the verbs, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


class VersionAction(argparse.Action):
    """Flag that prints versions; metadata are read only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print("\n".join(version_lines()))
        parser.exit()
