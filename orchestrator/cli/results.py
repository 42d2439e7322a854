"""Results of a compression and an evaluation as text."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.plan.cache_size import cache_bytes, cache_texts
from orchestrator.plan.result import (
    Result,
    bits_per_weight,
    bits_texts,
    kept_bytes,
    rank_multiples,
    read_report,
)
from orchestrator.plan.speed import forecast_texts
from orchestrator.readable import counted
from orchestrator.usage import Usage

EVALUATION_ROWS: dict[str, Callable[[Any], str]] = {
    "perplexity": "{:.2f}".format,
    "parameters": "{:,}".format,
    "bytes": "{:,}".format,
    "prefill_tokens_per_second": "{:,.1f}".format,
    "decode_tokens_per_second": "{:,.1f}".format,
}


def kept_rows(report: Mapping[str, Any]) -> dict[str, str]:
    """Kept fractions of the linears in values and in bytes, the requested one first."""
    kept, costs = report["kept"], report.get("costs", {})
    fractions = {"values": kept["linears"], "bytes": kept_bytes(report) or 0.0}
    for name, spent in (("operations", "operations"), ("time", "microseconds"), ("cache", "cache")):
        if spent in costs:
            fractions[name] = costs[spent]["planned"] / costs[spent]["dense"]
    asked = kept["asked_of"]
    shown = {asked: f"{fractions.pop(asked):.4f} (requested {kept['asked']:g})"}
    shown |= {unit: f"{fraction:.4f}" for unit, fraction in fractions.items()}
    return {
        f"kept fraction of the targeted linears, in {unit}": text for unit, text in shown.items()
    }


def bits_rows(report: Mapping[str, Any]) -> dict[str, str]:
    """Bits per weight of the linears beside the rates; empty if the report has no sizes."""
    found = bits_texts(report)
    return {"bits per weight of the linears": ", ".join(filter(None, found))} if found else {}


def _bits_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Bits per weight of an evaluated checkpoint; empty if it is dense, or its report unusable."""
    try:
        return bits_rows(read_report(Path(str(model["path"]))))
    except (AttributeError, InputError, TypeError):
        return {}


def print_evaluation(report: Mapping[str, Any]) -> None:
    """Print one row per quantity and one column per model, the dense one first; then the
    comparison."""
    models = [report["models"][name] for name in ("against", "model") if name in report["models"]]
    names = [Path(model["path"]).name for model in models]
    table = [["", *names]]
    for name, shown in EVALUATION_ROWS.items():
        if not any(name in model for model in models):
            continue
        values = [model[name] for model in models]
        label = name.replace("_", " ")
        table.append([label, *("unknown" if v is None else shown(v) for v in values)])
    print_table(table)
    for name, bits in _bits_of(models[-1]).items():
        print(f"{name}: {bits}")
    is_base = report.get("against_is_base", True)
    if "kl" in report:
        from_what = "the dense model" if is_base else table[0][1]
        print(f"mean KL divergence from {from_what} {report['kl']:.4f} nats, ", end="")
        print(f"same top token for {report['top1_agreement']:.1%}")
    if "tasks" in report:
        print()
        print_table(task_table(report["tasks"], names))
    if not is_base:
        print(f"{table[0][1]} is not the model that {table[0][2]} was compressed from")
    if "predictions" in report:
        used = report.get("memory")
        memory = f", peak memory of a worker: {Usage.from_json(used)}" if used else ""
        print(f"{counted(report['predictions'], 'prediction')}{memory}")


def task_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """Table of tasks: one row per metric, one column per model, and the retention."""
    keys = ("against", "model")[-len(names) :]
    heads = ["task", "metric", "documents", *names, *(["retention"] if len(names) > 1 else [])]
    table = [heads]
    for row in rows:
        scores = [score_text(row.get(key)) for key in keys]
        retention = [retention_text(row)] if len(names) > 1 else []
        documents = "unknown" if row["documents"] is None else f"{row['documents']:,}"
        table.append([row["task"], row["metric"], documents, *scores, *retention])
    return table


def retention_text(row: Mapping[str, Any]) -> str:
    """Retention of a metric, or the reason why it is unknown."""
    if row["retention"] is not None:
        return f"{row['retention']:.1%}"
    if row["higher_is_better"] is not True:
        return "unknown: higher is not better"
    return "unknown: dense is not above chance"


def score_text(score: Mapping[str, Any] | None) -> str:
    """Value of a metric with its standard error."""
    if score is None:
        return "unknown"
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
    return f"{score['value']:.4f}{error}"


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for label, *cells in table:
        shown_cells = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"{label:<{widths[0]}}", *shown_cells]).rstrip())


def print_result(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_with_forecast(result), indent=2))
        return
    kept, values = result.report["kept"], result.report["values"]
    multiples, speeds = rank_multiples(result.report), forecast_texts(result.speed_forecast)
    cache = cache_texts(result.report)
    costs, linears = result.report.get("costs", {}), result.report.get("linears", {})
    dense = f"{costs.get('dense_linears')} of {counted(len(linears), 'linear')}"
    print_rows(
        {
            **kept_rows(result.report),
            "kept fraction of the whole model": f"{kept['model']:.4f}",
            "parameters": f"{values['model_before']:,} before, {values['model_after']:,} after",
            **bits_rows(result.report),
            **({"cache of a token": ", ".join(cache)} if cache else {}),
            **({"ranks": "; ".join(filter(None, multiples))} if multiples else {}),
            **({"left dense": dense} if costs else {}),
            **{name: f"{found} {says}" for name, (found, says) in speeds.items()},
            "checkpoint": result.out,
            "run directory": result.run_dir,
        }
    )


def _with_forecast(result: Result) -> dict[str, Any]:
    """Report with the bits per weight, the cache of a token and the forecast of the speed, which
    follow from it."""
    return {
        **result.report,
        "bits_per_weight": bits_per_weight(result.report),
        "cache_bytes": cache_bytes(result.report),
        "speed_forecast": result.speed_forecast,
    }


def print_results(results: Sequence[Result], as_json: bool, *, is_one: bool) -> None:
    """Print results in order; as JSON a list of the reports, or the report of the only one."""
    if as_json and not is_one:
        print(json.dumps([_with_forecast(result) for result in results], indent=2))
        return
    for number, result in enumerate(results):
        if number:
            print()
        print_result(result, as_json)


def print_rows(rows: Mapping[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
