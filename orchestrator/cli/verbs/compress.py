"""`compress`: one size of a dense model, or several."""

import argparse
from typing import Any

from orchestrator.cli.asked import progress_of, recipe_of, sizes_of
from orchestrator.cli.flags import add_recipe, add_verb
from orchestrator.cli.results import print_results
from orchestrator.cli.stopping import stoppable


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "compress", "compress a dense model")
    add_recipe(parser)


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    sizes = sizes_of(options)
    recipe = recipe_of(options)
    with stoppable(), progress_of(options) as show:
        if sizes:
            results = api.compress_sizes(recipe, sizes, on_event=show)
        else:
            results = [api.compress(recipe, on_event=show)]
    print_results(results, options.json, is_one=not sizes)
