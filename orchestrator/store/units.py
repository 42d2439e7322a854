"""Units of work, named by the hash of their inputs, committed by a manifest written last.

The key of a unit is the hash of its stage, the version number of the stage's code, the keys of its
inputs and the parameters that affect its bits. It does not include the number of workers, the cut
of the model or the order of execution: computing a unit twice, anywhere, is harmless.

    units/<first two digits>/<key>/<file>     files of the unit
    units/<first two digits>/<key>/manifest.json   written last: sizes, hashes, environment, facts
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.store.cache import process_cache
from orchestrator.store.files import (
    atomic,
    digest_file,
    digest_json,
    parse_json,
    read_bytes,
    remove_tree,
    write_json,
)
from orchestrator.store.places import Place, Remote

_MANIFEST = "manifest.json"
_FORMAT_VERSION = 1
_SPENT_VERSION = 2
"""Manifest version of a spent unit; a reader that knows version 1 only treats the unit as
absent."""
PACKAGE = "orchestrator"
"""Name under which an environment has the version of this package."""


def is_equivalent(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return True if two environments give the same bits: equal but for the package's version.

    The version numbers in unit keys stand for that: a release that changes the bits of a unit
    changes its key, and leaves all others as they are.
    """
    there, here = ({n: v for n, v in each.items() if n != PACKAGE} for each in (there, here))
    return there == here


def unit_key(stage: str, version: int, inputs: Sequence[str], **parameters: Any) -> str:
    """Compute the name of a unit: a 256-bit hash of everything that determines its content."""
    return digest_json(
        {"stage": stage, "version": version, "inputs": list(inputs), "parameters": parameters}
    )


class UnitWriter:
    """Writer of one unit: files one by one, the manifest last."""

    def __init__(self, directory: Place) -> None:
        self._directory = directory
        self._files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a temporary path for a file of the unit."""
        path = self._directory / name
        with atomic(path) as temporary:
            yield temporary
            size, digest = temporary.stat().st_size, digest_file(temporary)
        self._files[name] = {"bytes": size, "blake2b": digest}

    def commit(self, *, environment: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write the manifest, which commits the unit.

        Args:
            environment: Other facts that affect bits: device kind, library versions, threads.
            facts: Small results of the unit, which the driver reads instead of the files.
        """
        manifest = {
            "format_version": _FORMAT_VERSION,
            "files": self._files,
            "environment": dict(environment),
            "facts": dict(facts),
        }
        # facts are results too, and JSON with a flipped digit is still valid
        manifest["blake2b"] = digest_json(manifest)
        write_json(self._directory / _MANIFEST, manifest, indent=None)


class Units:
    """Units of one run directory."""

    def __init__(self, root: Place) -> None:
        self.root = root

    def directory(self, key: str) -> Place:
        return self.root / key[:2] / key

    def begin(self, key: str) -> UnitWriter:
        """Start a unit; files of an earlier attempt are overwritten one by one."""
        return UnitWriter(self.directory(key))

    def manifest(self, key: str) -> dict[str, Any] | None:
        """Return the manifest of a committed unit, or None.

        A unit is committed if its manifest is complete and every file has the size stated there;
        `verify` also reads the content. A spent unit has no files.
        """
        directory = self.directory(key)
        try:
            manifest = parse_json(read_bytes(directory / _MANIFEST))
            digest = manifest.pop("blake2b")
            versions = (_FORMAT_VERSION, _SPENT_VERSION)
            if manifest["format_version"] not in versions or digest_json(manifest) != digest:
                return None
            sizes = directory.sizes() if isinstance(directory, Remote) else {}
            if not isinstance(manifest["facts"], dict):
                return None
            for name, file in manifest["files"].items():
                # plain file names only: a manifest must not refer to files outside its unit
                if name in ("", ".", "..") or "/" in name:
                    return None
                there = directory / name
                size = there.stat().st_size if isinstance(there, Path) else sizes.get(name)
                if size != file["bytes"]:
                    return None
            spent = manifest["format_version"] == _SPENT_VERSION
            kept = {name: manifest[name] for name in ("files", "environment", "facts")}
            return {**kept, "spent": spent}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def facts(self, key: str, environment: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the small results of a unit committed in an equivalent environment, or None."""
        manifest = self.manifest(key)
        if manifest is None or not is_equivalent(manifest["environment"], environment):
            return None
        facts: dict[str, Any] = manifest["facts"]
        return facts

    def verify(self, key: str) -> bool:
        """Return True if the unit is committed and every file has the hash stated in its
        manifest."""
        return self.manifest(key) is not None and all(
            digest_file(path) == digest for path, digest in self.hashes(key)
        )

    def file(self, key: str, name: str) -> Path:
        """Return a local path of a committed unit's file: the file itself, or a copy on this node.

        A file from a store is checked against its hash; the copy is kept while there is space.

        Raises:
            OrchestratorError: The file is missing or damaged in a store.
        """
        place = self.directory(key) / name
        return place if isinstance(place, Path) else process_cache().fetch(place, self._check)

    def _check(self, place: Remote, copy: Path) -> None:
        manifest = self.manifest(place.parent.name)
        if manifest is None or manifest["files"][place.name]["blake2b"] != digest_file(copy):
            raise OrchestratorError(
                f"{place}: differs from the manifest of its unit; run the same command again, "
                "which finds damaged units and computes them again"
            )

    def hashes(self, key: str) -> list[tuple[Place, str]]:
        """Return the files of a committed unit, each with the BLAKE2b hash of its manifest."""
        manifest = self.manifest(key)
        files = manifest["files"] if manifest is not None else {}
        return [(self.directory(key) / name, file["blake2b"]) for name, file in files.items()]

    def size(self, key: str) -> int:
        """Size of a committed unit's files in bytes."""
        manifest = self.manifest(key)
        return sum(file["bytes"] for file in manifest["files"].values()) if manifest else 0

    def spend(self, key: str) -> None:
        """Remove the files of a committed unit that no stage will read again; its facts are kept.

        The manifest is replaced first, so a unit never looks intact while its files are removed. A
        link to a unit of another run is not changed.
        """
        directory, manifest = self.directory(key), self.manifest(key)
        is_ours = not (isinstance(directory, Path) and directory.is_symlink())
        if manifest is None or not is_ours:
            return
        if not manifest.pop("spent"):
            spent = {**manifest, "format_version": _SPENT_VERSION, "files": {}}
            spent["blake2b"] = digest_json(spent)
            write_json(directory / _MANIFEST, spent, indent=None)
        for path in directory.iterdir():
            if path.name != _MANIFEST:
                path.unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        """Remove a unit, manifest first, so that it never looks complete during removal."""
        directory = self.directory(key)
        if isinstance(directory, Path) and directory.is_symlink():
            directory.unlink()  # the target belongs to another run
            return
        (directory / _MANIFEST).unlink(missing_ok=True)
        remove_tree(directory)

    def begun(self) -> list[str]:
        """Return the keys of all units that were started, in order."""
        starts = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(unit.name for start in starts for unit in start.iterdir())
