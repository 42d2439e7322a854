"""Units of work, named by what they are computed from, committed by a manifest that comes last.

A unit's key is the hash of its stage, the integer version of the stage's code, the keys of its
inputs and the parameters that matter to its bits. How many workers there are, how the model is cut
and in which order things ran are not in it: running a unit twice, anywhere, is harmless.

    units/<first two digits>/<key>/<file>     the unit's files
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
"""Version of a spent unit's manifest: a reader of version 1 alone takes the unit as absent."""


def unit_key(stage: str, version: int, inputs: Sequence[str], **parameters: Any) -> str:
    """The name of a unit: 256 bits over everything that decides its content."""
    return digest_json(
        {"stage": stage, "version": version, "inputs": list(inputs), "parameters": parameters}
    )


class UnitWriter:
    """One unit being written; its files appear one by one, its manifest at the end."""

    def __init__(self, directory: Place) -> None:
        self._directory = directory
        self._files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A temporary path to write one of the unit's files to."""
        path = self._directory / name
        with atomic(path) as temporary:
            yield temporary
            size, digest = temporary.stat().st_size, digest_file(temporary)
        self._files[name] = {"bytes": size, "blake2b": digest}

    def commit(self, *, environment: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Writes the manifest; from here on the unit is done.

        Args:
            environment: What else can change bits: device kind, library versions, threads.
            facts: The unit's small results, what the driver reads instead of the files.
        """
        manifest = {
            "format_version": _FORMAT_VERSION,
            "files": self._files,
            "environment": dict(environment),
            "facts": dict(facts),
        }
        # the facts are results too, and a flipped digit is still JSON
        manifest["blake2b"] = digest_json(manifest)
        write_json(self._directory / _MANIFEST, manifest, indent=None)


class Units:
    """The units of one run directory."""

    def __init__(self, root: Place) -> None:
        self.root = root

    def directory(self, key: str) -> Place:
        return self.root / key[:2] / key

    def begin(self, key: str) -> UnitWriter:
        """Starts a unit; what an earlier attempt left is overwritten file by file."""
        return UnitWriter(self.directory(key))

    def manifest(self, key: str) -> dict[str, Any] | None:
        """The manifest of a committed unit, or nothing.

        A unit counts as committed when its manifest is whole and every file has the size that the
        manifest says; `verify` also reads the content. One that is spent has no files.
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
                # a bare name only: a manifest must not lead out of its unit
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
        """The small results of a unit committed in this environment, or nothing."""
        manifest = self.manifest(key)
        if manifest is None or manifest["environment"] != dict(environment):
            return None
        facts: dict[str, Any] = manifest["facts"]
        return facts

    def verify(self, key: str) -> bool:
        """Whether the unit is committed and every file has the hash that its manifest says."""
        return self.manifest(key) is not None and all(
            digest_file(path) == digest for path, digest in self.hashes(key)
        )

    def file(self, key: str, name: str) -> Path:
        """A local path to open a committed unit's file by: itself, or a copy on this node.

        What comes from a store is compared with its hash; a copy stays while there is room.

        Raises:
            OrchestratorError: It is in a store, and missing or damaged there.
        """
        place = self.directory(key) / name
        return place if isinstance(place, Path) else process_cache().fetch(place, self._check)

    def _check(self, place: Remote, copy: Path) -> None:
        manifest = self.manifest(place.parent.name)
        if manifest is None or manifest["files"][place.name]["blake2b"] != digest_file(copy):
            raise OrchestratorError(
                f"{place}: is not what its unit's manifest says; run the same command again, "
                "which finds damaged units and makes them anew"
            )

    def hashes(self, key: str) -> list[tuple[Place, str]]:
        """The files of a committed unit, each with the BLAKE2b that its manifest says."""
        manifest = self.manifest(key)
        files = manifest["files"] if manifest is not None else {}
        return [(self.directory(key) / name, file["blake2b"]) for name, file in files.items()]

    def size(self, key: str) -> int:
        """Bytes of a committed unit's files."""
        manifest = self.manifest(key)
        return sum(file["bytes"] for file in manifest["files"].values()) if manifest else 0

    def spend(self, key: str) -> None:
        """Removes the files of a committed unit that no stage reads any more; its facts stay.

        The manifest is replaced first, so a unit never looks intact while its files are removed. A
        link to another run's unit is left alone.
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
        """Removes a unit, manifest first, so that it never looks whole while it goes."""
        directory = self.directory(key)
        if isinstance(directory, Path) and directory.is_symlink():
            directory.unlink()  # what lies behind it is not ours
            return
        (directory / _MANIFEST).unlink(missing_ok=True)
        remove_tree(directory)

    def begun(self) -> list[str]:
        """The keys of all units that have begun, in order."""
        starts = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(unit.name for start in starts for unit in start.iterdir())
