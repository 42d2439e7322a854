"""`compare`: an HTML page that compares runs."""

import argparse
from typing import Any

from orchestrator.cli.flags import add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "compare", "write an HTML page that compares runs")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directories, or compressed checkpoints"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="file of the page (default: comparison.html)"
    )


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.compare(options.runs, vars(options).get("output")))
