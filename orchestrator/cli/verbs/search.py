"""`search`: the best of several settings on held-out text."""

import argparse
from dataclasses import asdict
from typing import Any

from orchestrator.cli.asked import followed, recipe_of
from orchestrator.cli.flags import EVALUATION_FIELDS, add_field, add_recipe, add_tracking, add_verb
from orchestrator.cli.results import print_result
from orchestrator.cli.stopping import stoppable
from orchestrator.recipe.values import parse_vary

HELD_OUT = {"text": "text", "field": "text_field", "samples": "text_samples", "stride": "stride"}
"""Fields of an evaluation that `search` takes, with their flags there."""


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands, "search", "compress with several settings, and keep the best on held-out text"
    )
    add_recipe(parser)
    add_tracking(parser)
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="NAME=VALUE,...",
        help="values to try for a flag (storage=plain,pivoted) or an option (mgaa.t=0.5,1); "
        "may be repeated; every combination is tried",
    )
    for name, flag in HELD_OUT.items():
        add_field(parser, EVALUATION_FIELDS[name], flag=flag, is_required=name == "text")


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    recipe, vary = recipe_of(options), dict(map(parse_vary, options.vary))
    given = {name: getattr(options, flag) for name, flag in HELD_OUT.items() if flag in options}
    given |= {"sequence_length": recipe.sequence_length}
    run_dir = recipe.run_dir or f"{recipe.out}.run"
    with stoppable(), followed(options, run_dir, asdict(recipe)) as trackers:
        found = api.search(recipe, vary, on_event=trackers.on_event, **given)
        trackers.report(found.result.report)
    if not options.json:
        for candidate in found.candidates:
            setting = ", ".join(f"{name}={value}" for name, value in candidate.setting.items())
            mark = "  best" if candidate is found.best else ""
            print(f"{candidate.perplexity:12.2f}  {candidate.kept:.4f}  {setting}{mark}")
    print_result(found.result, options.json)
