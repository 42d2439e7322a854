"""`verify`: problems of a compressed checkpoint."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from orchestrator.cli.flags import add_json, add_verb
from orchestrator.cli.results import print_rows
from orchestrator.errors import InputError


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "verify", "check a compressed checkpoint and list its problems")
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("--against", metavar="DENSE", help="dense model to compare with")
    parser.add_argument(
        "--linears", metavar="N", type=int, help="number of linears to reconstruct (default: 14)"
    )
    add_json(parser, "print all results as JSON")


def run(options: argparse.Namespace) -> int:
    from orchestrator import api

    names = ("against", "linears")
    found = api.verify(options.out, **{n: getattr(options, n) for n in names if n in options})
    problems = found["problems"]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for problem in problems:
            print(f"wrong: {problem}")
        for note in found.get("notes", ()):
            print(f"note: {note}")
        if {"files", "tensors", "linears", "logits"} <= found.keys():
            _print_verification(found)
    return InputError.exit_code if problems else 0


def _print_verification(found: Mapping[str, Any]) -> None:
    files, linears, logits = found["files"], found["linears"], found["logits"]
    states = {state: list(files.values()).count(state) for state in files.values()}
    errors = [each["error"] for each in linears.values() if "error" in each]
    beside = f", |W - W'|²/|W|² up to {max(errors):.4f}" if errors else ""
    kl = (
        f", mean KL divergence from the dense model {logits['kl']:.4f} nats"
        if "kl" in logits
        else ""
    )
    print_rows(
        {
            "files": ", ".join(f"{count} {state}" for state, count in states.items()),
            "tensors": f"{found['tensors']} read",
            "linears": f"{len(linears)} reconstructed{beside}",
            "logits": f"{'finite' if logits['finite'] else 'not finite'}{kl}",
        }
    )
