"""Registries of methods, allocators, stages and forms: built-in ones and those of other packages.

An entry is text in the syntax of entry points, `module:Object`. A built-in entry is a line of a
table; another package declares its entries in the group of the registry:

    [project.entry-points."orchestrator.methods"]
    toy = "toy.method:Toy"

The object is imported when its value is first used. Names are listed without importing any, from
the metadata of the installed distributions, which is read once in a process.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from orchestrator.errors import UsageError

T = TypeVar("T")

_installed = cache(entry_points)


class NotRegisteredError(UsageError, KeyError):
    """A name is not in a registry: the package that adds it is not installed here."""

    __str__ = Exception.__str__  # that of a KeyError quotes the message


class Registry(Mapping[str, T]):
    """Values by name: built-in ones in the order of their table, then others sorted by name.

    Every access to a value may raise UsageError: the name does not exist (`NotRegisteredError`) or
    is given twice, or the object cannot be imported, is of another class, or has another name.

    Args:
        group: Group of the entry points of other packages.
        builtin: Built-in entries, `module:Object` by name.
        base: Class of the values.
        makes: True if values are objects of the class; an entry then names a class, which is
            called without arguments, or an object. False if values are the classes themselves.
    """

    def __init__(
        self, group: str, builtin: Mapping[str, str], *, base: type, makes: bool = False
    ) -> None:
        self.group = group
        self._builtin, self._base, self._makes = builtin, base, makes
        self._entries: dict[str, list[_Entry]] | None = None
        self._values: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            self._values[name] = self._load(self._only(name))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __contains__(self, name: object) -> bool:
        return name in self._found()

    def distribution(self, name: str) -> str:
        """Name and version of the package that an entry is from; empty for a built-in one.

        Raises:
            NotRegisteredError: There is no such entry.
            UsageError: The name is given twice.
        """
        return self._only(name).distribution

    def refresh(self) -> None:
        """Read the installed distributions again, after one was installed in this process."""
        _installed.cache_clear()
        self._entries, self._values = None, {}

    def _found(self) -> dict[str, list["_Entry"]]:
        """Entries by name, usually one each."""
        if self._entries is None:
            found = {
                name: [_Entry(EntryPoint(name, path, self.group), "")]
                for name, path in self._builtin.items()
            }
            others = _installed().select(group=self.group)
            for point in sorted(others, key=lambda each: (each.name, each.value)):
                found.setdefault(point.name, []).append(_Entry(point, _distribution(point)))
            self._entries = found
        return self._entries

    def _only(self, name: str) -> "_Entry":
        entries = self._found().get(name, ())
        if not entries:
            raise NotRegisteredError(
                f"{self.group}: {name!r} is not installed on this machine; there are "
                f"{', '.join(self)}"
            )
        if len(entries) > 1:
            given = " and by ".join(each.distribution or "orchestrator itself" for each in entries)
            raise UsageError(
                f"{self.group}: {name!r} is given by {given}; rename it in one of them, or "
                "uninstall that one"
            )
        return entries[0]

    def _load(self, entry: "_Entry") -> T:
        with _importing(entry.words):
            found = entry.point.load()
            if self._makes and isinstance(found, type):
                found = found()
        classes = type(found).__mro__ if self._makes else getattr(found, "__mro__", ())
        if self._base not in classes:
            need = (
                f"an object of a class below {self._base.__name__}"
                if self._makes
                else (f"a class below {self._base.__name__}")
            )
            raise UsageError(f"{entry.words}: is {found!r}; it must be {need}")
        name = getattr(found, "name", entry.point.name)
        if name != entry.point.name:
            raise UsageError(
                f"{entry.words}: its `name` is {name!r}; give the entry point that name"
            )
        value: T = found
        return value


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry point with the distribution that it is from."""

    point: EntryPoint
    distribution: str

    @property
    def words(self) -> str:
        """Description for messages: `toy 1.0: entry point 'toy' (toy.method:Toy) of ...`."""
        point, package = self.point, self.distribution or "orchestrator"
        return f"{package}: entry point {point.name!r} ({point.value}) of {point.group}"


def _distribution(point: EntryPoint) -> str:
    """Name and version of the distribution of an entry point."""
    assert point.dist is not None, "entry points of installed distributions have one"
    return f"{point.dist.name} {point.dist.version}"


def find(path: str, where: str) -> Any:
    """Import the object of a path, `module:Object`.

    Args:
        where: Beginning of the error's message.

    Raises:
        UsageError: It cannot be imported.
    """
    with _importing(where):
        return EntryPoint("", path, "").load()


@contextmanager
def _importing(where: str) -> Iterator[None]:
    """Turn any error of an import into a UsageError of one line."""
    try:
        yield
    except Exception as error:  # whatever another package raises when it is imported
        said = str(error).strip().splitlines()[:1] or ["no message"]
        raise UsageError(
            f"{where}: cannot be imported: {type(error).__name__}: {said[0]}; repair the "
            "package, or uninstall it"
        ) from error
