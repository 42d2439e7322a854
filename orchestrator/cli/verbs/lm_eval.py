"""`lm-eval`: lm-evaluation-harness with compressed models."""

import argparse
from typing import Any

SAYS = "run lm-evaluation-harness, with compressed checkpoints as models of type hf"
EPILOG = (
    "Arguments are those of lm_eval: orchestrator lm-eval run --help lists them. "
    "Needs pip install 'orchestrator[lm-eval]'."
)


def add_parser(commands: Any) -> None:
    """Add a parser that leaves all arguments as they are: none begins with its prefix."""
    parser = commands.add_parser(
        "lm-eval", help=SAYS, description=SAYS, epilog=EPILOG, prefix_chars="\0", add_help=False
    )
    parser.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="arguments of lm_eval")
    parser.set_defaults(command="lm-eval", verbose=False, json=False, show_help=parser.print_help)


def run(options: argparse.Namespace) -> int:
    if options.arguments in ([], ["-h"], ["--help"]):
        options.show_help()
        return 0
    from orchestrator import api

    return api.lm_eval(options.arguments)
