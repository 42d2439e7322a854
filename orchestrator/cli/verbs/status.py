"""`status`: the progress of a run."""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.cli.flags import add_json, add_verb
from orchestrator.cli.results import print_rows
from orchestrator.readable import duration
from orchestrator.usage import Usage

BAR = 24
"""Characters of the bar of a stage."""


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "status", "show the progress of a run, from its directory alone")
    parser.add_argument("run", metavar="RUN", help="run directory")
    add_json(parser, "print the status as JSON")


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    status = api.status(options.run)
    if options.json:
        print(json.dumps(status, indent=2))
        return
    print_rows(_rows(options.run, status))


def _rows(run: str, status: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a status: what is done and left first, then the rest, and the outputs."""
    rest = {name: value for name, value in status.items() if name != "outputs"}
    shown = {"run": run, "state": rest.pop("state")}
    if (progress := rest.pop("progress", None)) is not None:
        shown |= _progress(rest.pop("stage"), progress)
    elif "stage" in rest:
        shown["stage"] = rest.pop("stage")
    if "done" in rest and "total" in rest:
        shown["units"] = f"{rest.pop('done')} of {rest.pop('total')}"
    done_by = rest.pop("done_by", None)
    if isinstance(done_by, dict):
        shown |= {f"units by {who}": count for who, count in done_by.items()}
    for name, of in (("left", "stage"), ("run_left", "run")):
        if name in rest:
            shown[f"left of the {of}"] = f"about {duration(rest.pop(name))}"
    for name in ("started", "updated"):
        if name in rest:
            rest[name] = f"{duration(max(time.time() - rest[name], 0.0))} ago"
    if "memory" in rest:
        rest["memory"] = Usage.from_json(rest["memory"])
    outputs = enumerate(status["outputs"], start=1)
    return shown | rest | {f"output {number}": _output(each) for number, each in outputs}


def _progress(stage: str, progress: Mapping[str, Any]) -> dict[str, str]:
    """Bar of the present stage, and the count in its unit."""
    fraction = progress.get("fraction")
    if fraction is None:
        fraction = progress["done"] / max(progress["total"], 1)
    filled = round(BAR * min(max(fraction, 0.0), 1.0))
    bar = f"{stage} [{'#' * filled}{'.' * (BAR - filled)}] {fraction:.0%}"
    return {"stage": bar, progress["of"]: f"{progress['done']} of {progress['total']}"}


def _output(entry: Mapping[str, Any]) -> str:
    """Place of an output, and its size as far as it was recorded."""
    facts = []
    if "kept" in entry:
        facts.append(f"keep {entry['kept']:g} of {entry.get('of', 'values')}")
    if "parameters" in entry:
        facts.append(f"{entry['parameters']:,} parameters")
    return f"{entry['out']}" + (f" ({', '.join(facts)})" if facts else "")
