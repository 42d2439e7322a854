"""`status`: the progress of a run."""

import argparse
import json
import time
from typing import Any

from orchestrator.cli.flags import add_json, add_verb
from orchestrator.cli.results import print_rows
from orchestrator.readable import duration
from orchestrator.usage import Usage


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "status", "show the progress of a run, from its directory alone")
    parser.add_argument("run", metavar="RUN", help="run directory")
    add_json(parser, "print the status as JSON")


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    status = api.status(options.run)
    if options.json:
        print(json.dumps(status, indent=2))
        return
    shown = {"run": options.run, **status}
    for name in ("started", "updated"):
        if name in shown:
            shown[name] = f"{duration(max(time.time() - shown[name], 0.0))} ago"
    if "done" in shown and "total" in shown:
        shown["done"] = f"{shown['done']} of {shown.pop('total')}"
    if "left" in shown:
        shown["left"] = f"about {duration(shown['left'])}"
    if "memory" in shown:
        shown["memory"] = Usage.from_json(shown["memory"])
    print_rows(shown)
