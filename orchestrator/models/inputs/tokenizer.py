"""Loading of a checkpoint's tokenizer; no code from the directory is run."""

from fnmatch import fnmatchcase
from textwrap import shorten
from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.store.places import Place

VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "*.codes", "tekken.json")
"""Files of which nearly every tokenizer has at least one."""


def load_tokenizer(directory: Place) -> Any:
    """Load the tokenizer of a checkpoint directory.

    Raises:
        InputError: The directory has no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    local = small_files(directory)
    try:
        return AutoTokenizer.from_pretrained(local, local_files_only=True, trust_remote_code=False)
    except (
        BaseException
    ) as error:  # tokenizers raises bare Exception; its panics derive from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if not _has_vocabulary(local):
            raise InputError(
                f"{directory}: has no tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...);"
                " copy the files of the tokenizer that the model was trained with to this directory"
            ) from error
        line = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise InputError(f"{directory}: cannot load the tokenizer: {line}") from error


def check_tokenizer(directory: Place) -> None:
    """Test that a directory has a tokenizer; one with a file of a vocabulary is not loaded.

    Raises:
        InputError: It has no tokenizer.
    """
    if not _has_vocabulary(directory):
        # a few tokenizers, such as that of bytes, have no vocabulary
        load_tokenizer(directory)


def _has_vocabulary(directory: Place) -> bool:
    names = [path.name for path in directory.iterdir()]
    return any(fnmatchcase(name, pattern) for name in names for pattern in VOCABULARIES)
