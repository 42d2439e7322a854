"""Hook of mkdocs: pages that are made from sources when the documentation is built.

    python scripts/docs_pages.py --write      write the table of methods into docs/methods.md

The home page is the README; the reference is made from the parser, the fields of a recipe and the
catalogue, so that it cannot differ from them.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field
from itertools import dropwhile
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are files of the repository."""
METHODS = ROOT / "docs" / "methods.md"
TYPES = {bool: "true or false", float: "number", int: "whole number", str: "string"}
GENERATED = "Generated from the sources of this version.\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> Mapping[str, str]:
    """Return the text of every generated page, by its path below docs/."""
    return {
        **{page: moved((ROOT / source).read_text()) for page, source in FILES.items()},
        "reference/commands.md": "\n".join(commands()),
        "reference/recipe.md": "\n".join(recipe()),
        "reference/options.md": "\n".join(options()),
    }


def moved(text: str) -> str:
    """Change links from the root of the repository to links between pages."""
    for page, source in FILES.items():
        text = text.replace(f"]({source}", f"]({page}")
    # what is not a page is named without a link
    text = re.sub(r"\[([^]]*)\]\((?:examples|scripts)/[^)]*\)", r"\1", text)
    return re.sub(r"(\]\(|src=\")docs/", r"\1", text)


def commands() -> Iterator[str]:
    """Yield a section per verb: usage, arguments and flags."""
    from orchestrator.cli.parser import make_parser

    parser = make_parser()
    yield f"# Commands\n\n{GENERATED}\n{parser.description} {parser.epilog}\n"
    (verbs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for name, verb in verbs.choices.items():
        yield f"## {name}\n\n{sentence(verb.description or '')}\n"
        yield "| argument | meaning |\n|---|---|"
        for action in verb._actions:
            if not isinstance(action, argparse._HelpAction):
                yield row(f"`{written(action)}`", cell(action.help or ""))
        yield ""


def written(action: argparse.Action) -> str:
    """Write an argument as on a command line."""
    if action.metavar is not None:
        value = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    elif action.choices:
        value = ",".join(map(str, action.choices))
        value = f"{{{value}}}" if len(value) < 60 else action.dest.upper()
    else:
        value = action.dest.upper()
    if not action.option_strings:
        return f"[{value}]" if action.nargs in ("?", "*") else value
    flags = ", ".join(action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {value}"


def recipe() -> Iterator[str]:
    """Yield the fields of a recipe, and the presets."""
    from orchestrator.recipe.field import about, described
    from orchestrator.recipe.presets import PRESETS
    from orchestrator.recipe.recipe import Recipe
    from orchestrator.recipe.values import toml_value

    yield (
        f"# Recipe\n\n{GENERATED}\n"
        "A recipe is TOML; its keys are the fields below. Each is a flag too, with dashes in place "
        "of underscores, and flags take precedence: `--recipe FILE --keep 0.7`. Options of a "
        "method, an allocator or a stage are tables: see [options](options.md).\n"
    )
    every = described(Recipe)
    schedule = [name for name, field in every.items() if about(field).schedule]
    for title, says, names in (
        ("What is computed", "These decide the result.", [n for n in every if n not in schedule]),
        (
            "Where it runs",
            "These change duration and place. Exceptions: `threads` decides the order of sums, and "
            "`allow_mixed` permits the bits of several environments.",
            schedule,
        ),
    ):
        yield f"## {title}\n\n{says}\n\n| field | type | default | meaning |\n|---|---|---|---|"
        yield from (field_row(every[name]) for name in names)
        yield ""
    yield "## Presets\n\nFields that are given take precedence over those of `preset`.\n"
    for name, fields in PRESETS.items():
        yield f'`preset = "{name}"` stands for\n\n```toml'
        yield from (f"{k} = {toml_value(v)}" for k, v in fields.items() if k != "options")
        for table, values in fields.get("options", {}).items():
            yield f"\n[{table}]"
            yield from (f"{key} = {toml_value(value)}" for key, value in values.items())
        yield "```\n"


def field_row(field: Field[Any]) -> str:
    """Write a row about a field: type or choices, default, help."""
    from orchestrator.recipe.field import about
    from orchestrator.recipe.values import toml_value

    means = about(field)
    wanted: Any = get_args(field.type) or (field.type,)
    kind = "list of strings" if ... in wanted else " or ".join(TYPES.get(k, "") for k in wanted)
    kind = kind.removesuffix(" or ")
    if means.choices:
        kind = ", ".join(f"`{choice}`" for choice in means.choices)
    if field.default is MISSING:
        default = "required"
    else:
        default = "" if field.default is None else f"`{toml_value(field.default)}`"
    return row(f"`{field.name}`", kind, default, cell(means.help))


def options() -> Iterator[str]:
    """Yield the methods, allocators, stages and forms of this package with their options."""
    from orchestrator.catalogue import catalogue
    from orchestrator.recipe.values import toml_value

    yield (
        f"# Options\n\n{GENERATED}\n"
        "`--option mgaa.t=0.5` on the command line, or `t = 0.5` in a table `[mgaa]` of a recipe. "
        "`orchestrator methods` prints this list, with the entries of other installed packages.\n"
    )
    for kind, entries in catalogue().items():
        yield f"## {kind.capitalize()}\n"
        for entry in entries:
            if entry.package:
                continue
            source = f" ({entry.source})" if entry.source else ""
            yield f"### {entry.name}\n\n{text(entry.summary)}{source}\n"
            if entry.departure:
                yield f"Differs: {text(entry.departure)}\n\nUse: {text(entry.use)}\n"
            if entry.options:
                yield "| option | default | meaning |\n|---|---|---|"
            for each in entry.options:
                default = f"`{toml_value(each.default)}`"
                yield row(f"`{each.table}.{each.name}`", default, cell(each.help))
            yield ""


def methods_table() -> str:
    """Write the methods of this package, and the allocations that are published apart from one:
    definition, source, differences from it, advice."""
    from orchestrator.catalogue import catalogue

    rows = ["| `--method` | definition | source | differs | use |", "|---|---|---|---|---|"]
    found = catalogue()
    entries = [(entry.name, entry) for entry in found["methods"]]
    apart = (entry for entry in found["allocators"] if entry.departure)
    entries += [(f"--allocation {entry.name}", entry) for entry in apart]
    for name, entry in entries:
        if not entry.package:
            source = re.sub(r"(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", entry.source)
            said = (cell(each) for each in (entry.summary, entry.departure, entry.use))
            definition, departure, use = said
            source = source.removeprefix("arXiv ") or "derived here"
            rows.append(row(f"`{name}`", definition, source, departure, use))
    return "\n".join(rows) + "\n"


def with_methods(page: str) -> str:
    """Put the table of methods in the place of the first table of a page."""
    lines = page.splitlines(keepends=True)
    start = next(place for place, line in enumerate(lines) if line.startswith("|"))
    rest = "".join(dropwhile(lambda line: line.startswith("|"), lines[start:]))
    return "".join(lines[:start]) + methods_table() + rest


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def cell(said: str) -> str:
    return sentence(text(said).replace("|", "\\|").replace("%%", "%"))


def text(said: str) -> str:
    """Escape characters that Markdown would read as markup; code in backquotes stays."""
    parts = re.split(r"(`[^`]*`)", " ".join(said.split()))
    escaped = (re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2])
    codes = [*parts[1::2], ""]
    return "".join(a + b for a, b in zip(escaped, codes, strict=True))


def sentence(said: str) -> str:
    """Begin with a capital letter, except in a name."""
    return said[:1].upper() + said[1:]


def main() -> None:
    """Write the table of methods, with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    METHODS.write_text(with_methods(METHODS.read_text()))


if __name__ == "__main__":
    main()
