"""Ways of the fields of a recipe through the package, from its syntax trees.

A file is on the way of a field if it

- defines the field, or adds the flags of the command line;
- reads it, or a property made of it (`requested` of `keep`), from an object that has it: a recipe,
  an execution, a request of an evaluation, parsed arguments; the class of an object is that of its
  annotations;
- sets it by keyword or names it by a string, and imports one of these classes or their helpers;
  keys of a report, and the pages that show reports, do not count;
- gets its value under its own name: as a parameter, as a field of another class or as an attribute,
  whose reads count in turn.

The way ends where another value is computed from it. A local variable or a class that only uses the
same word is not on the way.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import orchestrator
from orchestrator.evaluation import EvaluationRequest
from orchestrator.recipe.field import described
from orchestrator.recipe.recipe import Recipe

PACKAGE = Path(orchestrator.__file__).parent
BEGIN = "cli/flags.py"
SOURCES = re.compile(r"orchestrator\.(recipe\.(recipe|field|execution|presets)|evaluation|cli)\b")
"""Modules whose importers name fields by strings and keywords."""
CARRIERS = {"Recipe", "CompressionFields", "Execution", "EvaluationRequest", "Namespace"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Package:
    """Syntax trees of all files, with the classes and functions that they define."""

    def __init__(self) -> None:
        self.trees: dict[str, ast.Module] = {}
        self.parents: dict[ast.AST, ast.AST] = {}
        self.files: dict[ast.AST, str] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.functions: dict[str, list[Function]] = {}
        for path in sorted(PACKAGE.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            name = self.files[tree] = path.relative_to(PACKAGE).as_posix()
            self.trees[name] = tree
            for node in ast.walk(tree):
                for child in ast.iter_child_nodes(node):
                    self.parents[child], self.files[child] = node, name
                if isinstance(node, ast.ClassDef):
                    self.classes[node.name] = node
                elif isinstance(node, Function):
                    self.functions.setdefault(node.name, []).append(node)
        self.attributes = self._attributes()
        self._locals: dict[ast.AST, dict[str, set[str]]] = {}
        self.naming = {self.files[node] for node in self.files if imports_fields(node)}
        self.naming = {name for name in self.naming if not name.startswith("pages/")}
        self.naming |= {name for name in self.trees if name.startswith("recipe/")}
        self.mentions: dict[str, list[ast.AST]] = {}
        for node in self.files:
            for word in mentioned(node):
                self.mentions.setdefault(word, []).append(node)

    def _attributes(self) -> dict[str, set[str]]:
        """Classes of attributes by name: of fields, properties, and parameters that are kept."""
        found: dict[str, set[str]] = {}
        for node in self.files:
            if isinstance(self.parents.get(node), ast.ClassDef):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.setdefault(node.target.id, set()).update(self.named(node.annotation))
                elif isinstance(node, Function):
                    found.setdefault(node.name, set()).update(self.named(node.returns))
            for target, value in assigned(node):
                if isinstance(target, ast.Attribute) and isinstance(value, ast.Name):
                    around = [each for each in self.around(node) if isinstance(each, Function)]
                    given = {each.arg: each for function in around for each in parameters(function)}
                    if value.id in given:
                        kinds = self.named(given[value.id].annotation)
                        found.setdefault(target.attr, set()).update(kinds)
        return found

    def named(self, annotation: ast.AST | None) -> set[str]:
        """Known classes in an annotation."""
        words = set() if annotation is None else {*re.findall(r"\w+", ast.unparse(annotation))}
        return words & (self.classes.keys() | {"Namespace"})

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around a node, from the inside out."""
        while (node := self.parents.get(node)) is not None:
            yield node

    def types(self, value: ast.AST) -> set[str]:
        """Classes that an expression may have."""
        match value:
            case ast.Name(id="self" | "cls"):
                return {each.name for each in self.around(value) if isinstance(each, ast.ClassDef)}
            case ast.Name(id=name):
                functions = [each for each in self.around(value) if isinstance(each, Function)]
                return set().union(*(self.locals(each).get(name, set()) for each in functions))
            case ast.Attribute(attr=name):
                return self.attributes.get(name, set())
            case ast.Call(func=ast.Name(id="replace"), args=[first, *_]):
                return self.types(first)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                returns = (self.named(each.returns) for each in self.functions.get(name, ()))
                return set().union({name} & self.classes.keys(), *returns)
        return set()

    def locals(self, function: Function) -> dict[str, set[str]]:
        """Classes of the parameters and variables of a function."""
        if function in self._locals:
            return self._locals[function]
        found = {each.arg: self.named(each.annotation) for each in parameters(function)}
        for node in ast.walk(function):
            for target, value in assigned(node):
                if isinstance(target, ast.Name) and isinstance(value, ast.Call | ast.Attribute):
                    found.setdefault(target.id, set()).update(self._kinds(value, found))
        self._locals[function] = found
        return found

    def _kinds(self, value: ast.AST, known: dict[str, set[str]]) -> set[str]:
        match value:
            case ast.Call(func=ast.Name(id="replace"), args=[ast.Name(id=name), *_]):
                return known.get(name, set())
        return self.types(value)

    def defining(self, name: str, field: str) -> ast.ClassDef:
        """The class of this name, or the one above it that has a field."""
        node = self.classes[name]
        own = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
        above = [word for base in node.bases for word in self.named(base)]
        return node if field in own or not above else self.defining(above[0], field)

    def names_field(self, text: ast.Constant) -> bool:
        """True for a string in a file about fields, except a name in a report."""
        if self.files[text] not in self.naming:
            return False
        match self.parents[text]:
            case ast.Dict() | ast.Subscript() | ast.Call(func=ast.Attribute(attr="get")):
                calls = [each for each in self.around(text) if isinstance(each, ast.Call)]
                made = {"make_recipe", "replace"} & {ast.unparse(each.func) for each in calls}
                return bool(made) or self.files[text].startswith(("recipe/", "cli/"))
        return True

    def with_subclasses(self, owners: set[str]) -> set[str]:
        """The classes, and all below them."""
        while True:
            below = {
                name
                for name, node in self.classes.items()
                if owners & {word for base in node.bases for word in self.named(base)}
            }
            if below <= owners:
                return owners
            owners = owners | below


def parameters(function: Function) -> list[ast.arg]:
    given = function.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs]


def assigned(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of targets and values of an assignment, a walrus or a `with`."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            yield from zip(targets, values, strict=False)
        case ast.Assign(targets=[target], value=value):
            yield target, value
        case ast.AnnAssign(target=target, value=ast.AST() as value):
            yield target, value
        case ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.withitem(context_expr=value, optional_vars=ast.AST() as target):
            yield target, value


class Way:
    """The way of one field: files, and the functions and classes that have its value."""

    def __init__(self, package: Package, name: str) -> None:
        self.package, self.field = package, name
        self.names = {name, *properties_of(package, name)}
        has = [each for each in (Recipe, EvaluationRequest) if name in described(each)]
        owners = {base.__name__ for each in has for base in each.__mro__} & CARRIERS
        self.owners = owners | {"Recipe", "Namespace"}
        self.files = {BEGIN}
        self.entered: set[Function] = set()
        known = -1
        while known != (known := len(self.owners) + len(self.entered) + len(self.files)):
            self._extend()

    def _extend(self) -> None:
        owners = self.package.with_subclasses(self.owners)
        for name in self.names:
            for node in self.package.mentions.get(name, ()):
                file = self.package.files[node]
                match node:
                    case ast.Attribute(value=value) if owners & self.package.types(value):
                        self._read(node, file)
                    case ast.Name() if self.entered.intersection(self.package.around(node)):
                        self._read(node, file)
                    case ast.AnnAssign():
                        parent = self.package.parents[node]
                        if isinstance(parent, ast.ClassDef) and parent.name in self.owners:
                            self.files.add(file)
                    case ast.Constant() if name == self.field and self.package.names_field(node):
                        self.files.add(file)
                    case ast.keyword() if owners & self.package.types(self.package.parents[node]):
                        self.files.add(file)

    def _read(self, node: ast.AST, file: str) -> None:
        """A file has the value; follow it to where it goes under its name."""
        self.files.add(file)
        inner: ast.AST = node
        for parent in self.package.around(node):
            match parent:
                case ast.BoolOp() | ast.keyword() | ast.Tuple() | ast.Starred():
                    inner = parent
                    continue
                case ast.Call(func=func):
                    self._passed(func, parent, inner)
                case ast.Assign() | ast.AnnAssign() | ast.NamedExpr():
                    self._assigned(parent, node)
            return

    def _passed(self, func: ast.AST, call: ast.Call, given: ast.AST) -> None:
        bare = func.id if isinstance(func, ast.Name) else getattr(func, "attr", "")
        place = call.args.index(given) if given in call.args else None
        keyword = given.arg if isinstance(given, ast.keyword) else None
        for function in self.package.functions.get(bare, ()):
            wanted = [each.arg for each in parameters(function)]
            wanted = wanted[1:] if wanted[:1] in (["self"], ["cls"]) else wanted
            got = wanted[place] if place is not None and place < len(wanted) else keyword
            if got == self.field and got in wanted:
                self.entered.add(function)
                self.files.add(self.package.files[function])
        if bare in self.package.classes and keyword == self.field:
            self._kept_by(self.package.defining(bare, keyword))
            # a class without annotations of its fields takes it in __init__
            for function in self.package.functions.get("__init__", ()):
                if self.package.parents[function] is self.package.classes[bare]:
                    self.entered.add(function)

    def _assigned(self, assignment: ast.AST, node: ast.AST) -> None:
        for target, value in assigned(assignment):
            if node not in ast.walk(value):
                continue
            around = [*self.package.around(node)]
            if isinstance(target, ast.Name) and target.id in self.names:
                self.entered.update(each for each in around if isinstance(each, Function))
            if isinstance(target, ast.Attribute) and target.attr.lstrip("_") in self.names:
                for owner in [each for each in around if isinstance(each, ast.ClassDef)][:1]:
                    self._kept_by(owner)

    def _kept_by(self, owner: ast.ClassDef) -> None:
        self.owners.add(owner.name)
        self.files.add(self.package.files[owner])


def mentioned(node: ast.AST) -> Iterator[str]:
    """The word by which a node may mean a field."""
    match node:
        case ast.Attribute(attr=word):
            yield word.lstrip("_")
        case ast.Name(id=word, ctx=ast.Load()) | ast.AnnAssign(target=ast.Name(id=word)):
            yield word
        case ast.Constant(value=str(word)) | ast.keyword(arg=str(word)):
            yield word


def imports_fields(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and bool(SOURCES.match(node.module or ""))


def properties_of(package: Package, name: str) -> set[str]:
    """Properties of a recipe that are made of a field."""
    return {
        node.name
        for owner in CARRIERS & package.classes.keys()
        for node in package.classes[owner].body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each) == "property" for each in node.decorator_list)
        and f"self.{name}" in {ast.unparse(each) for each in ast.walk(node)}
    }


def option_ways() -> dict[str, set[str]]:
    """Files on the way of every field of a recipe."""
    package = Package()
    return {name: Way(package, name).files for name in described(Recipe)}


if __name__ == "__main__":
    for name, files in sorted(option_ways().items(), key=lambda each: -len(each[1])):
        print(f"{len(files):3} {name}: {' '.join(sorted(files))}")
