"""Request of an evaluation: a model, a held-out text, and how to execute it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

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
    text: str = dataclasses.field(
        metadata=required(
            "held-out text: .txt, .jsonl, .parquet, a directory of these, "
            "datasets:NAME[:CONFIG[:SPLIT]], or a mixture by tokens: a.jsonl:0.7,b.txt:0.3",
            metavar="TEXT",
        )
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

    def models(self) -> dict[str, str]:
        """Models to evaluate, by their names in the report."""
        against = {} if self.against is None else {"against": self.against}
        return {"model": self.model, **against}

    def text_facts(self) -> dict[str, Any]:
        """Description of the held-out text, as arguments of `load_tokens`."""
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
