"""`evaluate`: quality, speed and size of a model."""

import argparse
import json
from typing import Any

from orchestrator.cli.asked import followed
from orchestrator.cli.flags import (
    EVALUATION_FIELDS,
    EXECUTION_FIELDS,
    add_field,
    add_json,
    add_progress,
    add_tracking,
    add_verb,
)
from orchestrator.cli.results import print_evaluation
from orchestrator.cli.stopping import stoppable
from orchestrator.recipe.field import about


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands, "evaluate", "measure perplexity, agreement with the dense model, speed and size"
    )
    parser.add_argument("model", metavar="MODEL", help=about(EVALUATION_FIELDS["model"]).help)
    own = [name for name in EVALUATION_FIELDS if name not in {"model", *EXECUTION_FIELDS}]
    for name in (*own, *EXECUTION_FIELDS):
        add_field(parser, EVALUATION_FIELDS[name])
    add_progress(parser)
    add_tracking(parser)
    add_json(parser, "print the result as JSON")


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    taken = vars(options).keys() - {"command", "json", "model", "progress", "track", "verbose"}
    arguments = {name: getattr(options, name) for name in taken}
    run_dir = arguments.get("run_dir") or f"{options.model.rstrip('/')}.evaluation"
    with stoppable(), followed(options, run_dir, {"model": options.model, **arguments}) as trackers:
        report = api.evaluate(options.model, on_event=trackers.on_event, **arguments)
        trackers.report(report)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_evaluation(report)
