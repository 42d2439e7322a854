"""Catalogue of methods, allocators, stages and forms: sources, packages and options, for people."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from orchestrator.allocate import ALLOCATORS
from orchestrator.errors import UsageError
from orchestrator.methods import METHODS
from orchestrator.plan.forms import FORMS
from orchestrator.registry import Registry
from orchestrator.stages import STAGES
from orchestrator.stages.base import Stage

REGISTRIES: Mapping[str, Registry[Any]] = {
    "methods": METHODS,
    "allocators": ALLOCATORS,
    "stages": STAGES,
    "forms": FORMS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionEntry:
    """Option of a method, an allocator or a stage."""

    table: str
    """Table of a recipe that it is in: `mgaa` of `--option mgaa.t=0.5`."""
    name: str
    default: Any
    help: str
    """Its documentation in the source; empty if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """Method, allocator, stage or form."""

    name: str
    summary: str
    """First sentences of its documentation."""
    source: str
    """Publication; empty if it was derived here."""
    departure: str = ""
    """Difference of a method or an allocation from its publication."""
    use: str = ""
    """Advice on when to take a method or an allocation."""
    package: str
    """Name and version of the package that it is from; empty for this one."""
    options: tuple[OptionEntry, ...] = ()
    error: str = ""
    """Reason for which it cannot be used; empty if it can."""


def catalogue() -> dict[str, list[CatalogueEntry]]:
    """List everything that is registered, by kind; an entry that cannot be imported has an error.

    Imports all of it, without torch.
    """
    return {
        kind: [_entry(registry, name) for name in registry] for kind, registry in REGISTRIES.items()
    }


def _entry(registry: Registry[Any], name: str) -> CatalogueEntry:
    try:
        package, found = registry.distribution(name), registry[name]
    except UsageError as error:
        return CatalogueEntry(name=name, summary="", source="", package="", error=str(error))
    owner: type[Any] = found if isinstance(found, type) else type(found)
    tables = owner.option_tables() if issubclass(owner, Stage) else {name: owner}
    return CatalogueEntry(
        name=name,
        summary=" ".join((inspect.getdoc(owner) or "").split("\n\n")[0].split()),
        source=getattr(owner, "source", ""),
        departure=getattr(owner, "departure", ""),
        use=getattr(owner, "use", ""),
        package=package,
        options=tuple(option for table, each in tables.items() for option in _options(table, each)),
    )


def _options(table: str, owner: type[Any]) -> Iterator[OptionEntry]:
    """Yield the fields of a dataclass that have a default."""
    if not is_dataclass(owner):
        return
    help_texts: dict[str, str] = {}
    for each in filter(is_dataclass, reversed(owner.__mro__)):
        help_texts |= _attribute_docstrings(each)
    for field in fields(owner):
        if field.default is not MISSING:
            said = help_texts.get(field.name, "")
            yield OptionEntry(table=table, name=field.name, default=field.default, help=said)


def _attribute_docstrings(owner: type[Any]) -> dict[str, str]:
    """Read the docstrings of a class's fields from its module's source, if it has one."""
    try:
        classes = _classes(inspect.getsource(sys.modules[owner.__module__]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    return classes.get(owner.__qualname__, {})


@cache
def _classes(source: str) -> dict[str, dict[str, str]]:
    """Docstrings of the fields of a module's classes, by the qualified name of the class.

    A module is parsed once, because an option may be in the classes of several entries.
    """
    found: dict[str, dict[str, str]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.ClassDef(name=name):
                    found[f"{prefix}{name}"] = _field_docstrings(child)
                    visit(child, f"{prefix}{name}.")
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    visit(child, f"{prefix}{name}.<locals>.")
                case ast.stmt() | ast.excepthandler() | ast.match_case():
                    visit(child, prefix)

    visit(ast.parse(source), "")
    return found


def _field_docstrings(owner: ast.ClassDef) -> dict[str, str]:
    """Strings below the fields of a class."""
    found = {}
    for field, below in pairwise(owner.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = below.value if isinstance(below, ast.Expr) else None
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                found[field.target.id] = " ".join(said.value.split())
    return found
