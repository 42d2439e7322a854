"""The verbs of the command line, one file each, in the order of the help."""

import argparse
from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.cli import completion
from orchestrator.cli.verbs import (
    bench,
    clean,
    compare,
    compress,
    doctor,
    evaluate,
    export,
    lm_eval,
    measure,
    methods,
    plan,
    push,
    report,
    retarget,
    search,
    status,
    submit,
    verify,
    watch,
)


class Verb(Protocol):
    """Module of a verb: its parser and its implementation."""

    def add_parser(self, commands: Any) -> None:
        """Add the parser of the verb, with its flags and help texts."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Perform the verb; returns the exit code, None for 0."""


VERBS: Mapping[str, Verb] = {
    "methods": methods,
    "plan": plan,
    "measure": measure,
    "compress": compress,
    "retarget": retarget,
    "search": search,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "bench": bench,
    "verify": verify,
    "export": export,
    "push": push,
    "status": status,
    "watch": watch,
    "report": report,
    "compare": compare,
    "clean": clean,
    "submit": submit,
    "doctor": doctor,
    "completion": completion,
}
