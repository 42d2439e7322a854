"""`bench`: speed of a model, beside the dense one."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.cli.flags import FIELDS, add_json, add_machine, add_verb
from orchestrator.cli.results import print_table
from orchestrator.errors import UsageError


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
    parser.add_argument(
        "--latency-table",
        metavar="FILE",
        help="measure the linears of a dense MODEL instead, at several ranks, and write the file "
        "that compress --keep-latency takes",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        help="tokens of each product of the latency table (default: 1)",
    )
    add_machine(parser)
    add_json(parser, "print all times as JSON")


def numbers(written: str) -> tuple[int, ...]:
    """Parse whole numbers that are separated by commas."""
    return tuple(int(part) for part in written.split(","))


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    if "latency_table" in options:
        return _latency(options)
    if "tokens" in options:
        raise UsageError("--tokens is for --latency-table; give --batch and --length")
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


def _latency(options: argparse.Namespace) -> None:
    from orchestrator import api
    from orchestrator.plan.latency_table import parse_latency_table

    for name in ("against", "batch", "length"):
        if name in options:
            raise UsageError(f"--{name} has no effect with --latency-table; give --tokens")
    names = {"tokens", *FIELDS} - {"model", "latency_table"}
    given = {name: value for name, value in vars(options).items() if name in names}
    found = api.measure_latency(options.model, options.latency_table, **given)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print_table(_shapes(found["linears"]))
    dense = sum(row["count"] * row["dense_seconds"] for row in found["linears"])
    print(f"all linears, dense: {1e6 * dense:,.1f} us")
    about = parse_latency_table(found, found["file"]).about
    print(f"{about}, {found['clock']} time, medians; written to {found['file']}")


def _shapes(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Table of shapes, with the ranks of each form that take less time than dense."""
    from orchestrator.plan.cost import first_slow

    table = [["linear", "number", "dense, us", "plain is faster", "pivoted is faster"]]
    for row in rows:
        outputs, inputs = row["shape"]
        cells = [str(row["count"]), f"{1e6 * row['dense_seconds']:,.1f}"]
        for form in ("low_rank", "pivoted"):
            slow = first_slow(row["forms"][form], row["dense_seconds"])
            cells.append("every rank" if slow is None else f"below {slow}")
        table.append([f"{outputs} x {inputs}", *cells])
    return table


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
