"""Output directory of a checkpoint: ownership, completion, and copied companion files.

config.json is written last; without it no reader accepts the directory as a checkpoint. Until
then `.orchestrator-unfinished` marks it as ours. A prefix in an object store is treated as a
directory too.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from typing import Any

from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.forms.config import METHOD
from orchestrator.store.files import atomic, digest_file, is_missing, remove_tree
from orchestrator.store.lease import Lease, removed
from orchestrator.store.places import Place, Remote, check_creatable

MARKER_FILE = ".orchestrator-unfinished"
LEASE_FILE = ".orchestrator-hold.json"
"""Names the driver that writes there; not part of the checkpoint, removed on completion."""

# matched in lower case
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "processing_*.py",
    "image_processing_*.py",
    "video_processing_*.py",
    "license*",
    "licence*",
    "notice*",
    "copying*",
    "use_policy*",
)

WRITTEN = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "modeling_orchestrator.py",
    "orchestrator_report.json",
    "recipe.toml",
    "readme.md",
    f"{LEASE_FILE}*",
    ".*.tmp",
)
"""Names of the other files of an output, in lower case."""


def check_out(out: Place) -> bool:
    """Test if `out` is a finished compressed checkpoint of ours, without changing it.

    Returns False if it does not exist, is empty, or is marked as ours and unfinished.

    Raises:
        UsageError: It is a file, or contains other files.
        InputError: It is ours and finished, but damaged.
    """
    if isinstance(out, Remote):
        out.check()
    if not out.exists():
        check_creatable(out)
        return False
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; give a directory that is new or empty")
    if (out / "config.json").is_file():
        forms = read_json(out / "config.json").get("quantization_config")
        if isinstance(forms, dict) and forms.get("quant_method") == METHOD:
            Weights.open(out)
            return True
    elif (out / MARKER_FILE).is_file():
        return False
    names = sorted(path.name for path in out.iterdir())
    found = [each for each in names if not each.startswith(LEASE_FILE)][:3]
    if not found:
        return False
    raise UsageError(
        f"{out}: contains other files ({', '.join(found)}); give a directory that is new or empty"
    )


def claim_out(out: Place, key: str = "") -> None:
    """Create `out` and mark it as an unfinished checkpoint of ours; must precede any file.

    Weights that an unfinished run with another key has left there are removed.

    Args:
        key: Hash of the inputs of the checkpoint, kept in the marker.

    Raises:
        UsageError: It contains other files, or a finished checkpoint.
        OrchestratorError: It cannot be written.
    """
    if check_out(out):
        raise UsageError(f"{out}: contains a finished checkpoint; give a new directory")
    marker = out / MARKER_FILE
    before = marker.read_bytes().decode(errors="replace").split("\n") if marker.is_file() else []
    # earlier versions wrote no key
    if len(before) > 2 and before[1] != key:
        for path in out.iterdir():
            if fnmatchcase(path.name, "model*.safetensors"):
                path.unlink(missing_ok=True)
    write_text(marker, f"This checkpoint is being written by orchestrator.\n{key}\n")


@contextmanager
def leased_out(out: Place, on_event: Callable[[dict[str, Any]], None] | None) -> Iterator[Lease]:
    """Lease a claimed output for this driver; an output without files of its own is removed.

    Raises:
        UsageError: Another driver holds the lease.
        OrchestratorError: The directory was removed during the run; files that were written to it
            since are removed too, because no run would accept them.
    """
    markers = out / MARKER_FILE, out / "config.json"
    is_unused = False
    try:
        with Lease(out / LEASE_FILE).taken(on_event) as lease:
            lease.depend_on(*markers)
            try:
                yield lease
            except BaseException:
                # within the lease, so that no other driver has begun to write
                if is_unused := _is_unused(out):
                    markers[0].unlink(missing_ok=True)
                raise
    except Exception as error:
        if not is_unused and all(map(is_missing, markers)):
            raise removed(out) from error
        raise
    finally:
        if all(map(is_missing, markers)):
            _remove_remains(out)


def _is_unused(out: Place) -> bool:
    """Test if the marker is the only file of a claimed directory, apart from the lease."""
    with suppress(OSError, OrchestratorError):
        names = {path.name for path in out.iterdir() if not path.name.startswith(LEASE_FILE)}
        return names == {MARKER_FILE}
    return False


def _remove_remains(out: Place) -> None:
    """Remove a directory that has only files that this program writes to an output."""
    with suppress(OSError, OrchestratorError):
        names = [path.name.lower() for path in out.iterdir()] if out.is_dir() else []
        patterns = *WRITTEN, *_COPIED
        if all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names):
            remove_tree(out)


def copy_companions(model: Place, out: Place) -> dict[str, str]:
    """Copy tokenizer, processor, chat template, generation config and licence byte for byte.

    Returns the BLAKE2b of every copy, by its name. Links are followed only within the model, or in
    the hub's cache to the blobs next to its snapshots, so that a model cannot make us publish other
    files of this machine.

    Raises:
        InputError: A link points outside the model.
    """
    source = small_files(model)
    digests = {}
    home = source.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    for path in sorted(source.iterdir()):
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in _COPIED):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    if not file.resolve().is_relative_to(home):
                        raise InputError(
                            f"{file}: is a link to {file.resolve()}, outside the model; "
                            "replace it by the file itself"
                        )
                    with atomic(out / file.relative_to(source)) as temporary:
                        shutil.copyfile(file, temporary)
                        digests[file.relative_to(source).as_posix()] = digest_file(temporary)
    return digests


def seal(out: Place, config: Mapping[str, Any]) -> None:
    """Complete the checkpoint: write config.json, then remove the marker."""
    write_json(out / "config.json", config)
    (out / MARKER_FILE).unlink(missing_ok=True)


def write_text(path: Place, text: str) -> str:
    """Write a file; returns its BLAKE2b."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        return digest_file(temporary)


def write_json(path: Place, value: Mapping[str, Any]) -> str:
    """Write JSON in the format of transformers, with keys in the given order; returns its
    BLAKE2b."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
