"""The tokenizer of a checkpoint directory; no code from the directory is run."""

from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.store.places import Place


def load_tokenizer(directory: Place) -> Any:
    """The tokenizer that the directory holds.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            small_files(directory), local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # tokenizers raises bare Exception, and panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory}: no tokenizer can be loaded: {line}") from error
