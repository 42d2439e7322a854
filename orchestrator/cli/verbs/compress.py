"""`compress`: one size of a dense model, or several."""

import argparse
from dataclasses import asdict
from typing import Any

from orchestrator.cli.asked import followed, recipe_of, sizes_of
from orchestrator.cli.flags import add_recipe, add_tracking, add_verb
from orchestrator.cli.results import print_results
from orchestrator.cli.stopping import stoppable


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "compress", "compress a dense model")
    add_recipe(parser)
    add_tracking(parser)


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    sizes = sizes_of(options)
    recipe = recipe_of(options)
    run_dir = recipe.run_dir or f"{recipe.out}.run"
    with stoppable(), followed(options, run_dir, asdict(recipe)) as trackers:
        if sizes:
            results = api.compress_sizes(recipe, sizes, on_event=trackers.on_event)
        else:
            results = [api.compress(recipe, on_event=trackers.on_event)]
        for result in results:
            trackers.report(result.report)
    print_results(results, options.json, is_one=not sizes)
