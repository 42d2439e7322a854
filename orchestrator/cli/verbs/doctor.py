"""`doctor`: versions, devices, Ray, disks and memory of this machine, with what to do."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from orchestrator.cli.flags import add_json, add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands,
        "doctor",
        "check versions, devices, Ray, disks and memory of this machine; exit code 1 if something "
        "required is missing",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster to look for: host:port of its head (default: RAY_ADDRESS, or the one "
        "that was started on this machine); no cluster is started",
    )
    add_json(parser, "print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    """Print one line per item, and below it the remedy."""
    from orchestrator import api

    found = api.doctor(address=getattr(options, "address", None))
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        width = max(len(each.item) for each in found)
        for each in found:
            remedy = f"; {each.remedy}" if each.remedy else ""
            print(f"{each.state:<7}  {each.item:<{width}}  {each.found}{remedy}")
    return int(any(each.fails for each in found))
