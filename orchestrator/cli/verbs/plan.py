"""`plan`: memory, time and cost of a compression."""

import argparse
import json
from typing import Any

from orchestrator.cli.asked import recipe_of
from orchestrator.cli.flags import add_json, add_recipe_flags, add_verb
from orchestrator.errors import InfeasibleError, UsageError


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands, "plan", "forecast memory, time and cost of a compression, from config and headers"
    )
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or config.json")
    parser.add_argument(
        "--gpus", metavar="N", type=int, help="number of workers, one per GPU (default: 1)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="H100, A100-80GB, A10G, ... (default: H100)")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="such as 80GB (default: that of the GPU)"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="host memory per worker (default: not checked)"
    )
    parser.add_argument("--price", metavar="AMOUNT", type=float, help="price of a worker per hour")
    parser.add_argument(
        "--rates", metavar="FILE", help="file written by `measure`, instead of --gpu"
    )
    add_recipe_flags(parser)
    add_json(parser, "print the forecast as JSON")


def run(options: argparse.Namespace) -> int:
    from orchestrator import api
    from orchestrator.forecast import text

    names = ("gpus", "gpu", "gpu_memory", "host_memory", "price", "rates")
    given = {name: getattr(options, name) for name in names if name in options}
    if "rates" in given and "gpu" in given:
        raise UsageError("--gpu names a GPU and --rates a measured machine; give one of them")
    options.out = "planned"
    found = api.plan(recipe_of(options), **given)
    print(json.dumps(found.to_json(), indent=2) if options.json else "\n".join(text.lines(found)))
    return InfeasibleError.exit_code if found.infeasible else 0
