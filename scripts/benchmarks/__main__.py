"""`scripts/benchmark`: one subcommand per question; figures as text and, with --json, as a file."""

import argparse
import ast
import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

SUBCOMMANDS = (
    *("quality", "methods", "generation", "ablation", "speed", "rpca", "memory", "large"),
    *("pivot", "refinement", "faults", "bookkeeping", "scale", "gpu", "serving", "images"),
    "experts",
)
"""Modules of `benchmarks`. Only the chosen one is imported, so that a benchmark without Ray runs if
Ray is not installed."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    commands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for name in SUBCOMMANDS:
        add_command(commands, name, is_chosen=sys.argv[1:2] == [name])
    options = parser.parse_args()
    figures = options.run(options)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def add_command(commands: argparse._SubParsersAction, name: str, *, is_chosen: bool) -> None:
    """Add a subcommand, described by the docstring of its module; the chosen one with arguments."""
    path = f"benchmarks.{name}"
    says = docstring(path)
    command = commands.add_parser(
        name,
        help=says.splitlines()[0],
        description=says,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if is_chosen:
        module = import_module(path)
        module.add_arguments(command)
        command.add_argument("--json", metavar="FILE", type=Path, help="figures as JSON")
        command.set_defaults(run=module.run)


def docstring(module: str) -> str:
    """Read the docstring of a module from its source, without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    main()
