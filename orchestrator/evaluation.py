"""Request of an evaluation: a model, a held-out text, and how to execute it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """Arguments of `orchestrator.evaluate`, with their defaults."""

    model: str | Path
    """Directory or hub id of a dense or compressed checkpoint."""
    text: str
    """Held-out text: .txt, .jsonl, .parquet, a directory of these, or `datasets:NAME`."""
    against: str | Path | None = None
    """Dense model to compare with; adds its own figures, the mean KL divergence from it in nats,
    and the fraction of tokens for which both models have the same top token."""
    field: str = "text"
    """Field of .jsonl and .parquet records that contains the text."""
    samples: int = 32
    """Number of sequences."""
    sequence_length: int = 2048
    """Number of tokens per sequence."""
    stride: int = 1
    """Use every `stride`-th sequence only."""
    layout: str = "packed"
    """As in `Recipe`, like the fields below without a text of their own."""
    dtype: str = "auto"
    """Dtype of the forward passes; `auto` is that of each checkpoint."""
    executor: str = "ray"
    address: str | None = None
    workers: int | str | None = None
    threads: int | None = None
    shards: int | None = None
    run_dir: str | Path | None = None
    """Run directory, from which the evaluation is resumed; None means `MODEL.evaluation`."""
    allow_mixed: bool = False
    """Add to scores from another device kind or version."""

    def models(self) -> dict[str, str]:
        """Models to evaluate, by their names in the report."""
        against = {} if self.against is None else {"against": str(self.against)}
        return {"model": str(self.model), **against}

    def text_facts(self) -> dict[str, Any]:
        """Description of the held-out text, as in the report."""
        names = ("field", "samples", "sequence_length", "stride", "layout")
        return {"source": self.text, **{name: getattr(self, name) for name in names}}

    def execution_facts(self) -> dict[str, Any]:
        """Fields of an `Execution`."""
        names = ("executor", "address", "workers", "threads", "shards", "allow_mixed")
        return {name: getattr(self, name) for name in names}
