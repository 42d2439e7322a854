"""`methods`: everything that is registered, as text or as JSON."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from orchestrator.cli.flags import add_json, add_verb
from orchestrator.recipe.values import toml_value

if TYPE_CHECKING:
    from orchestrator.catalogue import CatalogueEntry


WIDTH = 100


def add_parser(commands: Any) -> None:
    parser = add_verb(
        commands, "methods", "list methods, allocators, stages and forms, with their options"
    )
    add_json(parser, "print the list as JSON")


def run(options: argparse.Namespace) -> None:
    """Print methods, allocators, stages and forms with sources, packages and options."""
    from orchestrator.catalogue import catalogue

    found = catalogue()
    if options.json:
        named = {kind: [asdict(each) for each in entries] for kind, entries in found.items()}
        print(json.dumps(named, indent=2))
        return
    print("\n\n".join("\n".join([kind, *_section(kind, found[kind])]) for kind in found))


def _section(kind: str, entries: "list[CatalogueEntry]") -> Iterator[str]:
    """Yield the lines of one kind: a name with its summary, its origin, and its options.

    Options that several entries share are listed with the first one.
    """
    listed: dict[str, str] = {}
    for entry in entries:
        yield f"  {entry.name}"
        if entry.error:
            yield from _indented(f"cannot be used: {entry.error}")
            continue
        yield from _indented(entry.summary)
        is_published = kind in ("methods", "allocators")
        derived = "derived here" if is_published and not entry.package else ""
        origin = [entry.source or derived, f"from {entry.package}" if entry.package else ""]
        if any(origin):
            yield from _indented("; ".join(filter(None, origin)))
        yield from _indented(f"Differs: {entry.departure}") if entry.departure else ()
        yield from _indented(f"Use: {entry.use}") if entry.use else ()
        for table in {option.table: None for option in entry.options}:
            if listed.setdefault(table, entry.name) != entry.name:
                yield from _indented(f"{table}: see {listed[table]}", deeper="    ")
        for option in entry.options:
            if listed[option.table] != entry.name:
                continue
            text = f"{option.table}.{option.name} = {toml_value(option.default)}"
            yield from _indented(f"{text}  {option.help}", deeper="    ")


def _indented(text: str, deeper: str = "") -> list[str]:
    return wrap(
        text.strip(),
        width=WIDTH,
        break_on_hyphens=False,  # names stay whole
        initial_indent=f"    {deeper}",
        subsequent_indent=f"    {deeper}  " if deeper else "    ",
    )
