"""`retarget`: another size from the results of a run."""

import argparse
from typing import Any

from orchestrator.cli.asked import followed, sizes_of, with_options
from orchestrator.cli.flags import (
    EXECUTION_FIELDS,
    FIELDS,
    add_field,
    add_json,
    add_option,
    add_progress,
    add_tracking,
    add_verb,
)
from orchestrator.cli.results import print_results
from orchestrator.cli.stopping import stoppable
from orchestrator.recipe.field import about
from orchestrator.recipe.recipe import SIZE_FIELDS


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands,
        "retarget",
        "make another size from the stored results of a run, without calibration or SVD unless an "
        "option of the method changes them",
    )
    parser.add_argument("run", metavar="RUN", help="run directory of a compression")
    parser.add_argument("out", metavar="OUT", help="directory of the result")
    for name in (*SIZE_FIELDS, "latency_table", "rank_multiple", "max_shard_size"):
        add_field(parser, FIELDS[name])
    parser.add_argument(
        "--allocation",
        metavar="NAME",
        help="allocator that divides the budget over the linears (default: that of the run)",
    )
    add_option(parser)
    for field in EXECUTION_FIELDS.values():
        if field.name != "run_dir" and not about(field).decides_bits:
            add_field(parser, field)
    add_progress(parser)
    add_tracking(parser)
    add_json(parser, "print the whole report")


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    sizes = sizes_of(options)
    given = {name: value for name, value in vars(options).items() if name in {*FIELDS} - {"out"}}
    if "option" in options:
        given["options"] = with_options(options, {})
    settings = {"run": options.run, "out": options.out, **given}
    with stoppable(), followed(options, options.run, settings) as trackers:
        given["on_event"] = trackers.on_event
        if sizes:
            results = api.retarget_sizes(options.run, options.out, sizes, **given)
        else:
            results = [api.retarget(options.run, options.out, **given)]
        for result in results:
            trackers.report(result.report)
    print_results(results, options.json, is_one=not sizes)
