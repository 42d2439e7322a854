"""`report`: an HTML page about a run."""

import argparse
from typing import Any

from orchestrator.cli.flags import add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "report", "write an HTML page about a run")
    parser.add_argument("run", metavar="RUN", help="run directory, or a compressed checkpoint")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file of the page (default: RUN/report.html or OUT.report.html)",
    )


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.report(options.run, vars(options).get("output")))
