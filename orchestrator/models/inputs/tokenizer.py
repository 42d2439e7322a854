"""Loading of a checkpoint's tokenizer; no code from the directory is run."""

from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.store.places import Place


def load_tokenizer(directory: Place) -> Any:
    """Load the tokenizer of a checkpoint directory.

    Raises:
        InputError: The directory has no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            small_files(directory), local_files_only=True, trust_remote_code=False
        )
    except (
        BaseException
    ) as error:  # tokenizers raises bare Exception; its panics derive from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory}: cannot load the tokenizer: {line}") from error
