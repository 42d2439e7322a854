"""Request of an evaluation: a model, a held-out text or tasks, and how to execute it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import check_fields, option, required
from orchestrator.recipe.recipe import DTYPES


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest(Execution):
    """Arguments of `orchestrator.evaluate`, with their defaults.

    Raises:
        UsageError: A field has a type or value that is not allowed; checked on construction.
    """

    model: str = dataclasses.field(metadata=required("directory or hub id, dense or compressed"))
    text: str | None = option(
        None,
        "held-out text: .txt, .jsonl, .parquet, a directory of these, or "
        "datasets:NAME[:CONFIG[:SPLIT]]",
        metavar="TEXT",
    )
    tasks: tuple[str, ...] = option(
        (),
        "tasks of lm-evaluation-harness, separated by commas, for accuracy in place of or besides "
        "perplexity; each runs on both models in turn, in this process, with whole models",
        metavar="TASK,...",
    )
    task_dir: str | None = option(
        None, "directory with task files (YAML); no network is needed for them", metavar="DIR"
    )
    task_limit: int | None = option(
        None, "number of documents of each task (default: all)", at_least=1
    )
    shots: int | None = option(
        None,
        "examples in front of each document of a task (default: as many as the task states)",
        at_least=0,
    )
    against: str | None = option(
        None,
        "dense model to compare with; adds its own figures, the mean KL divergence from it in "
        "nats, and the fraction of tokens for which both models have the same top token",
        metavar="DENSE",
    )
    field: str = option("text", "field of .jsonl and .parquet records that contains the text")
    samples: int = option(32, "number of held-out sequences", at_least=1)
    sequence_length: int = option(2048, "number of tokens per sequence", at_least=1)
    stride: int = option(1, "use every N-th sequence only", at_least=1)
    layout: str = option(
        "packed",
        "packed windows of the joined text, or padded documents, of which only real tokens count",
        choices=("packed", "padded"),
    )
    dtype: str = option(
        "auto", "dtype of the forward passes; auto is that of each checkpoint", choices=DTYPES
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.text is None and not self.task_names:
            raise UsageError("text: neither a text nor tasks are given; give --text or --tasks")
        for name in ("task_dir", "task_limit", "shots"):
            if not self.task_names and getattr(self, name) is not None:
                raise UsageError(f"{name}: no tasks are given; give --tasks too, or leave it out")

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, each once."""
        names = (name.strip() for given in self.tasks for name in given.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def models(self) -> dict[str, str]:
        """Models to evaluate, by their names in the report."""
        against = {} if self.against is None else {"against": self.against}
        return {"model": self.model, **against}

    def text_facts(self) -> dict[str, Any] | None:
        """Description of the held-out text, as in the report; None if there is none."""
        if self.text is None:
            return None
        names = ("field", "samples", "sequence_length", "stride", "layout")
        return {"source": self.text, **{name: getattr(self, name) for name in names}}
