"""Request of an evaluation: a model, a held-out text or tasks, and how to execute it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import check_fields, option, required
from orchestrator.recipe.recipe import CHAT_TEMPLATE, DTYPES, LONGEST_SEQUENCE, TEXT_FIELD

MOST_HELD_OUT = 32
"""Held-out sequences of an evaluation that gives no number of them, at most."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest(Execution):
    """Arguments of `orchestrator.evaluate`, with their defaults.

    Raises:
        UsageError: A field has a type or value that is not allowed; checked on construction.
    """

    model: str = dataclasses.field(metadata=required("directory or hub id, dense or compressed"))
    text: str | None = option(
        None,
        "held-out text: .txt, .jsonl, .parquet, a directory of these, "
        "datasets:NAME[:CONFIG[:SPLIT]], or a mixture by tokens: a.jsonl:0.7,b.txt:0.3",
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
    field: str = option("text", TEXT_FIELD, not_empty=True)
    chat_template: str | None = option(None, CHAT_TEMPLATE, choices=("on", "off"))
    samples: int | None = option(
        None,
        "number of held-out sequences; a text with fewer is refused (default: "
        f"{MOST_HELD_OUT}, or as many as the text has)",
        at_least=1,
    )
    sequence_length: int | None = option(
        None,
        f"number of tokens per sequence (default: {LONGEST_SEQUENCE}, or the positions of the "
        "model; less for a short text if --samples is not given either)",
        at_least=1,
    )
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
        """Arguments of `load_tokens` for the held-out text; None if there is none."""
        if self.text is None:
            return None
        return {
            "source": self.text,
            **{
                name: getattr(self, name) for name in ("field", "stride", "layout", "chat_template")
            },
            "samples": self.samples or MOST_HELD_OUT,
            "fewer": self.samples is None,
            "sequence_length": self.sequence_length or LONGEST_SEQUENCE,
            "within_positions": self.sequence_length is None,
            "shorter": self.samples is None and self.sequence_length is None,
        }
