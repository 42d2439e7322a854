"""The directory a checkpoint is written to: whose it is, when it is whole, what goes with it.

config.json comes last: only from there on does anything take the directory for a checkpoint.
Until then `.orchestrator-unfinished` marks it as ours. A prefix in an object store is a directory
here too.
"""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.forms.config import METHOD
from orchestrator.store.files import atomic
from orchestrator.store.places import Place, Remote

MARKER_FILE = ".orchestrator-unfinished"
LEASE_FILE = ".orchestrator-hold.json"
"""Says which driver writes there; not part of the checkpoint, and gone when it is whole."""

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
    "license*",
    "licence*",
    "notice*",
    "copying*",
    "use_policy*",
)


def check_out(out: Place) -> bool:
    """Whether `out` holds a finished compressed checkpoint of ours; changes nothing.

    False where it does not exist, is empty, or is marked as ours and unfinished.

    Raises:
        UsageError: It is a file, or holds something else.
        InputError: It is ours and finished, but damaged.
    """
    if isinstance(out, Remote):
        out.check()
    if not out.exists():
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
    found = sorted({path.name for path in out.iterdir()} - {LEASE_FILE})[:3]
    if not found:
        return False
    raise UsageError(
        f"{out}: holds something else ({', '.join(found)}); give a directory that is new or empty"
    )


def claim_out(out: Place) -> None:
    """Makes `out` and marks it as an unfinished checkpoint of ours; needed before any file.

    Raises:
        UsageError: It holds something else, or a finished checkpoint.
        OrchestratorError: It cannot be written.
    """
    if check_out(out):
        raise UsageError(f"{out}: holds a finished checkpoint; give a directory that is new")
    write_text(out / MARKER_FILE, "This checkpoint is being written by orchestrator.\n")


def copy_companions(model: Place, out: Place) -> None:
    """Copies tokenizer, chat template, generation config and licence files byte for byte.

    A link is followed within the model, or, as they lie in the hub's cache, to the blobs beside its
    snapshots: what else it may lead to is not the model's to give away.

    Raises:
        InputError: A link leads elsewhere.
    """
    source = small_files(model)
    home = source.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    for path in sorted(source.iterdir()):
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in _COPIED):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    if not file.resolve().is_relative_to(home):
                        raise InputError(
                            f"{file}: is a link out of the model, to {file.resolve()}; "
                            "put the file itself in its place"
                        )
                    with atomic(out / file.relative_to(source)) as temporary:
                        shutil.copyfile(file, temporary)


def seal(out: Place, config: Mapping[str, Any]) -> None:
    """Makes the directory a checkpoint: config.json, then the mark goes."""
    write_json(out / "config.json", config)
    (out / MARKER_FILE).unlink(missing_ok=True)


def write_text(path: Place, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Place, value: Mapping[str, Any]) -> None:
    """JSON as transformers writes it, the keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
