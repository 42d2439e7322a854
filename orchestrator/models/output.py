"""The directory a checkpoint is written to: whose it is, when it is whole, what goes with it.

config.json comes last: only from there on does anything take the directory for a checkpoint.
Until then `.orchestrator-unfinished` marks it as ours.
"""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.models.forms import METHOD
from orchestrator.models.weights import Weights, read_json
from orchestrator.store.files import atomic

MARKER_FILE = ".orchestrator-unfinished"

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


def check_out(out: Path) -> bool:
    """Whether `out` holds a finished compressed checkpoint of ours; changes nothing.

    False where it does not exist, is empty, or is marked as ours and unfinished.

    Raises:
        UsageError: It is a file, or holds something else.
        InputError: It is ours and finished, but damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
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
    found = sorted(path.name for path in out.iterdir())[:3]
    raise UsageError(
        f"{out}: holds something else ({', '.join(found)}); give a directory that is new or empty"
    )


def claim_out(out: Path) -> None:
    """Makes `out` and marks it as an unfinished checkpoint of ours; needed before any file.

    Raises:
        UsageError: It holds something else, or a finished checkpoint.
        OrchestratorError: It cannot be written.
    """
    if check_out(out):
        raise UsageError(f"{out}: holds a finished checkpoint; give a directory that is new")
    write_text(out / MARKER_FILE, "This checkpoint is being written by orchestrator.\n")


def copy_companions(source: Path, out: Path) -> None:
    """Copies tokenizer, chat template, generation config and licence files byte for byte."""
    for path in sorted(source.iterdir()):
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in _COPIED):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    with atomic(out / file.relative_to(source)) as temporary:
                        shutil.copyfile(file, temporary)


def seal(out: Path, config: Mapping[str, Any]) -> None:
    """Makes the directory a checkpoint: config.json, then the mark goes."""
    write_json(out / "config.json", config)
    (out / MARKER_FILE).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON as transformers writes it, the keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
