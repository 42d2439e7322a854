"""Results of `evaluate`, before and after compression."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from orchestrator.pages import tables
from orchestrator.pages.markup import Markup
from orchestrator.pages.tables import DASH, head, number, row_head
from orchestrator.readable import counted
from orchestrator.usage import Usage

QUANTITIES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "perplexity": ("perplexity", "{:.2f}".format),
    "parameters": ("parameters", "{:,}".format),
    "bytes": ("bytes", "{:,}".format),
    "prefill_tokens_per_second": ("prefill, tokens/s", "{:,.1f}".format),
    "decode_tokens_per_second": ("decode, tokens/s", "{:,.1f}".format),
}
AGREEMENT: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kl": ("mean KL divergence from the dense model, nats", "{:.4f}".format),
    "top1_agreement": ("same first token", "{:.1%}".format),
}


def evaluated_text(facts: Mapping[str, Any]) -> str:
    """Describe the data and the memory of an evaluation."""
    used = facts.get("memory")
    memory = f"; peak memory of a worker: {Usage.from_json(used)}" if used else ""
    other = (
        "" if against_base(facts) else f" {_against(facts)} is not the model that was compressed."
    )
    return f"{text_of(facts)}{memory}.{other}"


def against_base(facts: Mapping[str, Any]) -> bool:
    """False if the other model is known not to be the one that was compressed."""
    return facts.get("against_is_base", True) is not False


def _against(facts: Mapping[str, Any]) -> str:
    """Name of the other model: dense, or its directory's if it is not what was compressed."""
    path = facts["models"].get("against", {}).get("path")
    return "dense" if against_base(facts) or not path else PurePath(str(path)).name


def text_of(facts: Mapping[str, Any]) -> str:
    """Describe the text: source, size and number of predictions."""
    text = facts.get("text", {})
    says = f"On {text.get('source', 'an unnamed text')}"
    if "sequences" in text and "sequence_length" in text:
        says += f", {counted(text['sequences'], 'sequence')} of "
        says += counted(text["sequence_length"], "token")
    if text.get("images"):
        says += f", {counted(text['images'], 'image')}"
    if "predictions" in facts:
        says += f", {counted(facts['predictions'], 'prediction')}"
    return says


def before_and_after(facts: Mapping[str, Any]) -> Markup:
    """Table with one row per quantity: dense, compressed, and their ratio; of one model alone, its
    values."""
    ours, dense = (facts["models"].get(name, {}) for name in ("model", "against"))
    rows = []
    for name, (label, shown) in QUANTITIES.items():
        before, after = dense.get(name), ours.get(name)
        if before is None and after is None:
            continue
        change = f"{after / before:.3g} ×" if before and after is not None else DASH
        cells = [number(DASH if each is None else shown(each), each) for each in (before, after)]
        cells = [*cells, number(change)] if dense else cells[1:]
        rows.append([row_head(label), *cells])
    for name, (label, shown) in AGREEMENT.items():
        if facts.get(name) is not None:
            if not against_base(facts):
                label = label.replace("the dense model", _against(facts))
            agreement = number(shown(facts[name]), facts[name])
            rows.append([row_head(label), number(DASH), agreement, number(DASH)])
    names = (_against(facts), "compressed", "ratio") if dense else ("value",)
    heads = [head(""), *(head(name, "n") for name in names)]
    return tables.table(heads, rows, label="evaluation")


def task_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all tasks, each once; those of a model that is not the compressed one are omitted."""
    rows: dict[str, dict[str, Any]] = {}
    for facts in evaluations:
        for row in facts.get("tasks", ()):
            shown = row if against_base(facts) else {**row, "against": None, "retention": None}
            rows.setdefault(task_key(row), shown)
    return [*rows.values()]


def task_key(row: Mapping[str, Any]) -> str:
    """Name of a metric of a task, with its documents and examples."""
    shots = f", {row['shots']} shots" if row.get("shots") else ""
    documents = row.get("documents")
    of = f", {documents:,} documents" if documents is not None else ""
    kind = "" if row.get("filter") in (None, "none") else f", {row['filter']}"
    return f"{row['task']}: {row['metric']}{kind}{shots}{of}"


def score(value: Mapping[str, Any] | None) -> Markup:
    """Cell of a metric with its standard error."""
    if value is None:
        return number(DASH)
    error = "" if value.get("stderr") is None else f" ± {value['stderr']:.4f}"
    return number(f"{value['value']:.4f}{error}", value["value"])


def task_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Table with one row per task and metric: dense, compressed, and the retention."""
    shown = []
    for row in rows:
        kept = row.get("retention")
        retention = number(DASH if kept is None else f"{kept:.1%}", kept)
        cells = [score(row.get(name)) for name in ("against", "model")]
        shown.append([row_head(task_key(row)), *cells, retention])
    names = ("dense", "compressed", "retention")
    heads = [head("task"), *(head(name, "n") for name in names)]
    return tables.table(heads, shown, label="tasks")
