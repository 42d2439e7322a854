"""Comparison of the files of a compressed checkpoint with the digests in its report."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.digests import (
    CONFIG_FILE,
    REPORT_DIGEST,
    config_digest,
    report_digest,
)
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.checkpoint.write import CARD_FILE
from orchestrator.plan.result import REPORT_FILE
from orchestrator.store.files import digest_file
from orchestrator.store.places import Place

TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
"""Files of a tokenizer."""
READ = (*TOKENIZER, "*.py", "*.json", "*.jinja", "*.safetensors", "*.bin")
"""Files that a program may read, or execute, as it loads a model."""


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """State of every file: `as reported`, `changed` or `not reported`; and the problems."""

    states: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_files(
    directory: Path, report: Mapping[str, Any], dense: Place | None = None
) -> StoredFiles:
    """Compare every file with its digest in the report, and the report with that in the config.

    A changed or missing file is a problem, as is an additional one that a program would read. The
    model card, which its owner edits, is none. In a checkpoint of an earlier version only weights
    have digests.

    Args:
        dense: Directory of the dense model; its tokenizer must have been copied.

    Raises:
        InputError: The report or the config is damaged.
    """
    reported = report.get("files", {})
    if not isinstance(reported, Mapping):
        raise InputError(f"{directory / REPORT_FILE}: files is not an object of digests")
    config = read_json(directory / CONFIG_FILE)
    bound = config["quantization_config"].get(REPORT_DIGEST)
    expected = dict(reported)
    if bound is not None:
        expected[REPORT_FILE] = bound
    states = {
        name: _state(directory, name, expected, {"config": config, "report": report})
        for name in _names(directory)
    }
    problems = [
        f"{name} is not the file that was written"
        for name, state in states.items()
        if state == "changed" and name != CARD_FILE
    ]
    gone = expected.keys() - states.keys() - {CARD_FILE}
    if dense is not None:
        names = {path.name for path in small_files(dense).iterdir() if path.is_file()}
        gone |= {name for name in names if _matches(name, TOKENIZER)} - states.keys()
    problems += [f"{name} is missing" for name in sorted(gone)]
    notes: tuple[str, ...] = ()
    if bound is None:
        notes = (
            f"{directory}: written by an earlier version, without digests of files other than "
            "weights; these are not checked",
        )
    else:
        problems += [
            f"{name} is not among the files that were written"
            for name, state in states.items()
            if state == "not reported" and _matches(name, READ)
        ]
    return StoredFiles(states, tuple(f"{directory}: {each}" for each in problems), notes)


def _state(
    directory: Path,
    name: str,
    expected: Mapping[str, Any],
    contents: Mapping[str, Mapping[str, Any]],
) -> str:
    if name not in expected:
        return "not reported"
    if name == CONFIG_FILE:
        found = config_digest(contents["config"])
    elif name == REPORT_FILE:
        found = report_digest(contents["report"])
    else:
        found = digest_file(directory / name)
    return "as reported" if found == expected[name] else "changed"


def _names(directory: Path) -> list[str]:
    """Names of all files that are not hidden, those of subdirectories with their path."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    is_shown = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(path.as_posix() for path in is_shown)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """True for a file of the directory itself, or a template, whose name matches a pattern."""
    if "/" in name and not name.startswith("additional_chat_templates/"):
        return False
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
