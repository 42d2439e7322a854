"""`watch`: a live page of a run."""

import argparse
from contextlib import suppress
from functools import partial
from typing import Any

from orchestrator.cli.flags import add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "watch", "show a live page of a run in a browser; Ctrl-C ends")
    parser.add_argument("run", metavar="RUN", help="run directory, which may not exist yet")
    parser.add_argument(
        "--port", metavar="N", type=int, help="port of the page; 0: any free one (default: 8270)"
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help="address to listen at; with any other than the default everyone who reaches it "
        "can read the run (default: 127.0.0.1)",
    )


def run(options: argparse.Namespace) -> None:
    """Serve the page; the keyboard ends it, which is no error."""
    from orchestrator import api

    given = {name: getattr(options, name) for name in ("port", "host") if name in options}
    with suppress(KeyboardInterrupt):
        api.watch(options.run, say=partial(print, flush=True), **given)
