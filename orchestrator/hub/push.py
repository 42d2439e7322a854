"""Push of a checkpoint to a repository of a model hub, in one commit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.hub.card import published_card
from orchestrator.hub.names import check_repository
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.other_formats import check_compressed
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.checkpoint.write import CARD_FILE
from orchestrator.models.evaluation.stored_files import check_files
from orchestrator.pages.sources import read_source, whole
from orchestrator.plan.result import REPORT_FILE
from orchestrator.store.files import digest_file

Say = Callable[[str], None]


def push_checkpoint(
    out: Path, repo: str, *, private: bool | None, revision: str | None, say: Say
) -> str:
    """Create the repository if it does not exist, and upload the checkpoint; returns the address.

    Uploaded are the files that the report names, itself, config.json and the card; others are
    named and left. A card that its owner has edited is uploaded as it is.

    Raises:
        InputError: `out` is not a compressed checkpoint, or a file differs from its digest.
        UsageError: The name of the repository is not valid, or there is no token.
        OrchestratorError: The hub does not respond, or refuses.
    """
    files, card = prepare(out, repo, say)
    if get_token() is None:
        raise UsageError(
            "push: no token of the hub; log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write"
        )
    operations = [
        CommitOperationAdd(CARD_FILE, card.encode()),
        *(CommitOperationAdd(name, str(out / name)) for name in files),
    ]
    api = HfApi(library_name="orchestrator")
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(created.repo_id, branch=revision, exist_ok=True)
        say(f"uploading {len(operations)} files to {created.repo_id}")
        commit = api.create_commit(
            created.repo_id,
            operations,
            commit_message="Upload a model compressed by orchestrator",
            revision=revision,
        )
    except Exception as error:  # of the network, the hub, or a proxy
        raise OrchestratorError(f"{api.endpoint}: {_reason(error)}") from error
    return str(commit.commit_url)


def prepare(out: Path, repo: str, say: Say) -> tuple[list[str], str]:
    """Check a checkpoint; returns the names of its files without the card, and the card.

    Raises:
        InputError: It is not a compressed checkpoint, or a file differs from its digest.
        UsageError: The name of the repository is not valid.
    """
    check_repository(repo)
    check_compressed(out, "push")
    Weights.open(out)
    config = read_json(out / "config.json")
    report = read_json(out / REPORT_FILE)
    found = check_files(out, report)
    if found.problems:
        first, *more = found.problems
        others = f" ({len(more)} more; see `orchestrator verify {out}`)" if more else ""
        raise InputError(f"{first}{others}; a damaged checkpoint is not pushed")
    for note in found.notes:
        say(f"note: {note}")
    is_complete = not found.notes
    reported = [n for n, state in found.states.items() if state == "as reported"]
    # earlier versions recorded the digests of weights only
    files = reported if is_complete else [*found.states]
    files = sorted({*files, "config.json", REPORT_FILE} - {CARD_FILE})
    if left := sorted(found.states.keys() - {*files, CARD_FILE}):
        say(f"note: not pushed, since the compression did not write them: {', '.join(left)}")
    path, written = out / CARD_FILE, report.get("files", {}).get(CARD_FILE)
    if written is not None and path.is_file() and digest_file(path) != written:
        say(f"note: {path} was edited, and is pushed as it is")
        return files, path.read_text(encoding="utf-8")
    with whole(out):
        return files, published_card(read_source(out), repo, config)


def _reason(error: Exception) -> str:
    """One line about a failure, with a remedy if it is known."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"denies access ({status}); check that the token may write to the repository"
    said = (str(error).strip().splitlines() or [""])[0][:200]
    kind = type(error).__name__
    return f"the push failed, repeat it: {kind}: {said}" if said else f"the push failed: {kind}"
