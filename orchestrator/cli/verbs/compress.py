"""`compress`: one size of a dense model, or several."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from orchestrator.cli.asked import followed, recipe_of
from orchestrator.cli.flags import add_recipe, add_tracking, add_verb
from orchestrator.cli.results import print_result
from orchestrator.cli.stopping import stoppable
from orchestrator.recipe.recipe import SIZE_FIELDS


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "compress", "compress a dense model")
    add_recipe(parser)
    add_tracking(parser)


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    sizes = _sizes(options)
    recipe = recipe_of(options)
    run_dir = recipe.run_dir or f"{recipe.out}.run"
    with stoppable(), followed(options, run_dir, asdict(recipe)) as trackers:
        if sizes:
            results = api.compress_sizes(recipe, sizes, on_event=trackers.on_event)
        else:
            results = [api.compress(recipe, on_event=trackers.on_event)]
        for result in results:
            trackers.report(result.report)
    if not sizes:
        print_result(results[0], options.json)
        return
    if options.json:
        print(json.dumps([result.report for result in results], indent=2))
    else:
        for result in results:
            print_result(result, as_json=False)


def _sizes(options: argparse.Namespace) -> tuple[float, ...]:
    """Return the sizes if several are given; the option is set to the first one."""
    for name in SIZE_FIELDS:
        sizes = getattr(options, name, None)
        if isinstance(sizes, tuple):
            setattr(options, name, sizes[0])
            return sizes
    return ()
