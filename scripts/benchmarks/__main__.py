"""`scripts/benchmark`: one subcommand a question, figures as text and, with --json, as a file."""

import argparse
import json
from pathlib import Path

from benchmarks import (
    ablation,
    bookkeeping,
    faults,
    large,
    memory,
    methods,
    pivot,
    quality,
    refinement,
    rpca,
    scale,
    speed,
)

SUBCOMMANDS = {
    "quality": quality,
    "methods": methods,
    "ablation": ablation,
    "speed": speed,
    "rpca": rpca,
    "memory": memory,
    "large": large,
    "pivot": pivot,
    "refinement": refinement,
    "faults": faults,
    "bookkeeping": bookkeeping,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    commands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for name, module in SUBCOMMANDS.items():
        says = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=says,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", metavar="FILE", type=Path, help="figures as JSON")
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    figures = options.run(options)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
