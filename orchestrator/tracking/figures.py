"""Figures of events and reports, as series of numbers by group."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MEASURED = ("perplexity", "bytes", "prefill_tokens_per_second", "decode_tokens_per_second")


class SeriesPoint(NamedTuple):
    """Values of one group at one step."""

    group: str
    values: Mapping[str, float]
    step: int


def of_event(event: Mapping[str, Any]) -> Iterator[SeriesPoint]:
    """Points of an event: progress and seconds of stages, and losses of the training."""
    match event:
        case {"event": "unit", "stage": stage, "done": done, "total": total} if total:
            yield SeriesPoint("progress", {stage: done / total}, done)
        case {"event": "stage", "state": "end", "stage": stage, "seconds": seconds}:
            yield SeriesPoint("seconds", {stage: seconds}, 0)
        case {"event": "snapshot", "step": step}:
            yield SeriesPoint(
                "train", numbers({k: v for k, v in event.items() if k != "step"}), step
            )


def of_report(report: Mapping[str, Any]) -> Iterator[SeriesPoint]:
    """Points of the report of a compression or an evaluation."""
    if "kept" in report:
        kept = {f"kept_{name}": report["kept"].get(name) for name in ("linears", "model")}
        sizes = {f"bytes_{name}": value for name, value in report.get("bytes", {}).items()}
        parameters = {"parameters": report.get("values", {}).get("model_after")}
        yield SeriesPoint("result", numbers(kept | sizes | parameters), 0)
    for name, used in report.get("timings", {}).get("memory", {}).items():
        yield SeriesPoint("memory", numbers({f"{name}_host": used.get("host")}), 0)
        device = used.get("device") or {}
        yield SeriesPoint("memory", numbers({f"{name}_gpu": device.get("reserved")}), 0)
    for stage, facts in report.items():
        blocks = facts.get("blocks") if isinstance(facts, Mapping) else None
        for block, losses in blocks.items() if isinstance(blocks, Mapping) else ():
            values = {name: losses.get(name) for name in ("before", "after")}
            yield SeriesPoint(stage, numbers(values), int(block))
    for name, model in report.get("models", {}).items():
        prefix = "dense_" if name == "against" else ""
        values = {f"{prefix}{each}": model.get(each) for each in MEASURED}
        yield SeriesPoint("evaluation", numbers(values), 0)
    agreement = {name: report.get(name) for name in ("kl", "top1_agreement")}
    yield SeriesPoint("evaluation", numbers(agreement), 0)
    for row in report.get("tasks", ()):
        name = f"{row['task']}_{row['metric']}"
        scores = {"": row.get("model"), "dense_": row.get("against")}
        found = {f"{prefix}{name}": score["value"] for prefix, score in scores.items() if score}
        yield SeriesPoint("tasks", numbers(found | {f"retention_{name}": row["retention"]}), 0)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers among the values."""
    plain = {name: v for name, v in values.items() if type(v) in (int, float)}
    return {name: float(v) for name, v in plain.items() if math.isfinite(v)}
