"""`push`: a checkpoint on a model hub."""

import argparse
import sys
from functools import partial
from typing import Any

from orchestrator.cli.flags import add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands,
        "push",
        "upload a compressed checkpoint to a model hub, with a card of its figures",
    )
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("repo", metavar="REPO", help="repository, OWNER/NAME; created if needed")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="visibility of a new repository (default: that of the owner's settings)",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, created if needed (default: main)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the files and print the card; no network"
    )


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    names = ("private", "revision", "dry_run")
    given = {name: getattr(options, name) for name in names if name in options}
    say = partial(print, file=sys.stderr, flush=True)
    print(api.push(options.out, options.repo, say=say, **given))
