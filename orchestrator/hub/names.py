"""Names of repositories on a model hub."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from orchestrator.errors import UsageError


def check_repository(repo: str) -> None:
    """Raise UsageError unless the name is OWNER/NAME.

    A hub takes a bare NAME as one of the token's owner; the commands of the card need the owner.
    """
    try:
        if "/" not in repo:
            raise HFValidationError("no owner")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"repo is {repo!r}; it must be OWNER/NAME of a model hub") from error
