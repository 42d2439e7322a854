"""Evaluation, verification, conversion and loading of checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.evaluation import EvaluationRequest
from orchestrator.events import OnEvent, announce_imports


def evaluate(
    model: str | Path, *, on_event: OnEvent | None = None, **request: Any
) -> dict[str, Any]:
    """Measure perplexity, speed, size and accuracy of a model, and its distance to another one.

    On a text it runs through the shards like a calibration, with the same blocks of both models
    side by side: a process never holds a whole model unless there is only one shard. Tasks of
    lm-evaluation-harness run in this process, with whole models.

    Args:
        request: The fields of `orchestrator.evaluation.EvaluationRequest`.

    Returns:
        `models` (for `model` and `against`: perplexity = exp of the mean over sequences of the
        mean loss, parameters, bytes, tokens per second in prefill and in decoding), `kl`,
        `top1_agreement`, `predictions`, `text`, `tasks` (rows by task and metric, with value and
        standard error of both models and the retention), and the environment; `against_is_base` is
        False if `against` is not the model that `model` was compressed from.

    Raises:
        UsageError: A field has a type or value that is not allowed.
        OrchestratorError: Another subclass; `exit_code` tells which.
    """
    from orchestrator.api.checks import check_model, check_text

    # before torch is imported, which takes seconds
    asked = EvaluationRequest(model=str(model), **request)
    for each in asked.models().values():
        check_model(each)
    if asked.text is not None:
        check_text(asked.text)
    announce_imports(on_event)
    from orchestrator.harness.options import TaskOptions
    from orchestrator.models.checkpoint.weights import parse_dtype
    from orchestrator.stages import driver
    from orchestrator.stages.evaluate.values import ask_evaluation
    from orchestrator.store.places import parse_place

    tasks = TaskOptions(
        names=asked.task_names,
        directory=asked.task_dir,
        limit=asked.task_limit,
        shots=asked.shots,
    )
    # a hub id has no directory: use the working directory
    beside = Path(model).absolute() if Path(model).is_dir() else parse_place(model).name
    evaluation = ask_evaluation(
        asked.models(),
        text=asked.text_facts(),
        tasks=tasks if tasks.names else None,
        dtype=parse_dtype(asked.dtype),
        execution=asked,
        run_dir=parse_place(asked.run_dir or f"{beside}.evaluation"),
    )
    return driver.evaluate(evaluation, on_event)


def lm_eval(arguments: Sequence[str]) -> int:
    """Run the command line of lm-evaluation-harness with compressed checkpoints as models.

    The forms are registered with transformers first, so `--model hf` loads them without
    `trust_remote_code`; everything else is the harness's own.

    Args:
        arguments: `["--model", "hf", "--model_args", "pretrained=OUT", "--tasks", ...]`.

    Returns:
        The exit code.

    Raises:
        UsageError: lm-evaluation-harness is not installed.
    """
    from orchestrator.harness.installed import check_installed, run_command_line

    check_installed()
    from orchestrator import hf

    hf.register()
    return run_command_line(arguments)


def verify(
    out: str | Path, *, against: str | Path | None = None, linears: int = 14
) -> dict[str, Any]:
    """Check a compressed checkpoint: hashes, shapes, ranks, values, reconstructions, logits.

    See `orchestrator.models.evaluation.verification`.

    Args:
        against: Directory of the dense model, with which errors and logits are compared.
        linears: Number of linears to reconstruct.

    Returns:
        The findings; `problems` is empty for a valid checkpoint.
    """
    from orchestrator.errors import UsageError

    # before torch is imported, which takes seconds
    if linears < 0:
        raise UsageError(f"linears is {linears}; it must be 0 or above")
    from orchestrator.models.evaluation.verification import verify as perform
    from orchestrator.resolve import estimates_errors
    from orchestrator.stage_names import LEARN
    from orchestrator.stages import STAGES

    def changes_errors(report: Mapping[str, Any]) -> bool:
        """Only stages that the report has are imported."""
        method, in_order = report.get("recipe", {}).get("method"), LEARN in report
        learned = report.get(LEARN, {})
        if learned.get("gains") or learned.get("adapters"):
            return True
        if estimates_errors(method, in_order=in_order):
            return True
        return any(name in report and STAGES[name].changes_errors for name in STAGES)

    dense = None if against is None else Path(against)
    return perform(Path(out), changes_errors=changes_errors, dense=dense, linears=linears)


def export(out: str | Path, dense_dir: str | Path, format: str = "dense") -> Path:
    """Convert a compressed checkpoint to dense weights, for programs without support for factors.

    Raises:
        UsageError: The format is unknown, or `dense_dir` contains other files.
        InputError: `out` is not a compressed checkpoint, or is damaged.
    """
    from orchestrator.errors import UsageError
    from orchestrator.models.checkpoint.other_formats import check_compressed

    # before torch is imported, which takes seconds
    if format != "dense":
        raise UsageError(f"format is {format!r}; it must be dense")
    check_compressed(Path(out), "export")
    from orchestrator.hf.export import export_dense

    export_dense(Path(out), Path(dense_dir))
    return Path(dense_dir)


def push(
    out: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Upload a compressed checkpoint to a model hub, with a card of its figures.

    The card has the sizes, the evaluations beside the checkpoint, the recipe and the commands.

    Args:
        repo: Repository, OWNER/NAME; created if it does not exist.
        private: Visibility of a new repository; None means that of the owner's settings.
        revision: Branch, created if it does not exist; None means the main one.
        dry_run: Check the files and return the card, without network.
        say: Receives notes, such as files that are not pushed.

    Returns:
        Address of the commit, or the card.

    Raises:
        InputError: `out` is not a compressed checkpoint, or a file differs from its digest.
        UsageError: The name of the repository is not valid, or there is no token.
        OrchestratorError: The hub does not respond, or refuses.
    """
    from orchestrator.hub.names import check_repository
    from orchestrator.models.checkpoint.other_formats import check_compressed

    # before torch is imported, which takes seconds
    check_repository(repo)
    check_compressed(Path(out), "push")
    from orchestrator.hub.push import prepare, push_checkpoint

    if dry_run:
        return prepare(Path(out), repo, say)[1]
    return push_checkpoint(Path(out), repo, private=private, revision=revision, say=say)


def load(out: str | Path, **options: Any) -> Any:
    """Load a compressed (or dense) checkpoint as a transformers model.

    Args:
        options: Arguments of `from_pretrained` of transformers: `dtype`, `device_map`, ...
    """
    from orchestrator import hf

    return hf.load(out, **options)
