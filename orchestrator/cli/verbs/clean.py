"""`clean`: removal of a run directory, with the list of the removed and the remaining files."""

import argparse
from typing import Any

from orchestrator.cli.flags import add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands, "clean", "remove a run directory; files that others put there are left"
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="only list the files to be removed and those to be left",
    )


def run(options: argparse.Namespace) -> None:
    """Clean a run directory; single files are listed in a dry run only."""
    from orchestrator import api

    found = api.clean(options.run, dry_run=options.dry_run)
    if options.dry_run:
        for place in found.removed:
            print(f"would remove {place}")
    elif found.left:
        print(f"removed the files of the run in {options.run}")
    else:
        print(f"removed {options.run}")
    for place in found.left:
        print(f"{'would leave' if options.dry_run else 'left'} {place}, not written by this run")
