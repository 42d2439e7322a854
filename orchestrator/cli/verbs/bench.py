"""`bench`: speed of a model, beside the dense one."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.cli.flags import FIELDS, add_json, add_machine, add_verb
from orchestrator.cli.results import print_table


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands,
        "bench",
        "measure prefill and decoding of a model and of its linears, beside the dense model and "
        "the limits of this machine",
    )
    parser.add_argument("model", metavar="MODEL", help="directory, compressed or dense")
    parser.add_argument("--against", metavar="DENSE", help="dense model, measured in turn with it")
    parser.add_argument(
        "--batch", metavar="N,...", type=numbers, help="numbers of sequences (default: 1,8,64)"
    )
    parser.add_argument(
        "--length",
        metavar="N,...",
        type=numbers,
        help="tokens of a sequence in prefill, and before a decoded one (default: 128)",
    )
    add_machine(parser)
    add_json(parser, "print all times as JSON")


def numbers(written: str) -> tuple[int, ...]:
    """Parse whole numbers that are separated by commas."""
    return tuple(int(part) for part in written.split(","))


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    names = {"against", "batch", "length", *FIELDS} - {"model"}
    given = {name: value for name, value in vars(options).items() if name in names}
    found = api.bench(options.model, **given)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print_table(_whole(found))
    if found["linears"]:
        print()
        print_table(_linears(found["linears"]))
    for line in _explanations(found):
        print(line)
    print(f"{found['device']}, {found['clock']} time, medians; written to {found['file']}")


def _whole(found: Mapping[str, Any]) -> list[list[str]]:
    names = [name for name in ("against", "model") if name in found["models"]]
    shown = {"against": "dense", "model": "model"}
    table = [["", *(f"{shown[n]}, ms" for n in names), *(f"{shown[n]}, tokens/s" for n in names)]]
    table[0] += ["speed"] if len(names) > 1 else []
    for row in found["whole"]:
        models = [row["models"][name] for name in names]
        label = f"{row['phase']}, {row['batch']} x {row['length']}"
        cells = [f"{1e3 * each['seconds']:.3g}" for each in models]
        cells += [f"{each['tokens_per_second']:,.1f}" for each in models]
        table.append([label, *cells, *([f"{row['speed']:.2f} x"] if "speed" in row else [])])
    return table


def _linears(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [
        [
            "linear",
            "number",
            "form",
            "rank",
            "tokens",
            "dense, us",
            "model, us",
            "least, us",
            "speed",
        ]
    ]
    for row in rows:
        outputs, inputs = row["shape"]
        seconds = [row[name] for name in ("dense_seconds", "seconds", "least_seconds")]
        table.append(
            [
                f"{row['role']} {outputs} x {inputs}",
                str(row["count"]),
                row["form"],
                str(row["rank"] or "-"),
                f"{row['tokens']:,}",
                *(f"{1e6 * each:,.1f}" for each in seconds),
                f"{row['speed']:.2f} x",
            ]
        )
    return table


def _explanations(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines about what is slower than dense, each reason of linears once with an example."""
    for row in found["whole"]:
        if row["why"]:
            where = f"{row['phase']}, {row['batch']} x {row['length']}"
            yield f"{where} is slower than dense: {'; '.join(row['why'])}"
    told: set[str] = set()
    for row in found["linears"]:
        for reason in row["why"]:
            if (kind := reason.partition(":")[0]) not in told:
                told.add(kind)
                yield f"{row['role']} at {row['tokens']:,} tokens: {reason}"
