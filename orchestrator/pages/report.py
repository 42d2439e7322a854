"""Page of one run: recipe, result, losses and timings."""

from collections.abc import Mapping
from typing import Any

from orchestrator.pages import linear_sections, tables
from orchestrator.pages.evaluation import evaluation_page, evaluation_section, is_evaluation
from orchestrator.pages.experts import experts_map
from orchestrator.pages.happened import happened
from orchestrator.pages.linears import entries
from orchestrator.pages.markup import Markup, element, joined, page, section, write_page
from orchestrator.pages.memory import memory
from orchestrator.pages.searched_plans import searched_plans
from orchestrator.pages.sources import Source, read_source, whole
from orchestrator.pages.speeds import speeds
from orchestrator.pages.tables import cell, head, number, row_head
from orchestrator.plan.result import bits_texts, kept_bytes, rank_multiples
from orchestrator.plan.speed import forecast_texts, speed_forecast
from orchestrator.readable import counted, duration, size
from orchestrator.recipe.recipe import SCHEDULE
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory
from orchestrator.version import __version__

KNOWN = {
    *("format_version", "producer", "key", "base_fingerprint", "architecture", "recipe", "kept"),
    *("bytes", "calibration", "values", "linears", "not_targeted", "timings"),
    *("files", "rank_multiple", "experts", "search"),
}
"""Report fields with a dedicated place, and digests; all others are listed as "Also reported"."""
KEPT_OF = {
    "keep": "values",
    "keep_bytes": "bytes",
    "keep_flops": "operations",
    "keep_latency": "time",
}
"""Fields of a size, with the quantity of which each is a fraction."""
WANTED = {
    "kept.linears": "kept fraction of the targeted linears",
    "kept.model": "kept fraction of the whole model",
    "values.model_before": "parameters before",
    "values.model_after": "parameters after",
    "values.stored": "stored values",
    "values.budget": "budget",
    "calibration": "calibration",
    "linears": "linears",
    "timings.seconds": "timings",
}
"""Report fields that the page shows, with their names in the list of missing fields."""


def write_report(run: Place, output: Place | None = None) -> Place:
    """Write the page of a run directory, or of a compressed checkpoint; returns its path.

    The page of a run of `evaluate` has its results.

    Args:
        output: The file; None means `report.html` in the run directory, or `OUT.report.html` beside
            a checkpoint, so that the checkpoint directory gets no extra file.

    Raises:
        InputError: The place is neither a run nor a checkpoint, or one of its files is damaged.
        UsageError: `output` is a directory.
    """
    if _is_evaluation(run):
        return write_page(output or run / "report.html", rendered_report(run))
    source, content = _read_and_composed(run)
    if output is None:
        is_run = source.run == source.place
        beside = source.place.with_name(f"{source.place.name}.report.html")
        output = source.place / "report.html" if is_run else beside
    return write_page(output, content)


def rendered_report(run: Place) -> Markup:
    """Return the page of `write_report` without writing it.

    Raises:
        InputError: As `write_report`.
    """
    if _is_evaluation(run):
        with whole(run):
            return evaluation_page(run.expanduser().absolute())
    return _read_and_composed(run)[1]


def _is_evaluation(run: Place) -> bool:
    """Return True for the run directory of an `evaluate`."""
    directory = RunDirectory(run.expanduser().absolute())
    return directory.marker.is_file() and is_evaluation(directory.description())


def _read_and_composed(run: Place) -> tuple[Source, Markup]:
    with whole(run):
        source = read_source(run)
        return source, report_page(source)


def report_page(source: Source) -> Markup:
    """Compose the page."""
    found = entries(source.report)
    return page(
        f"{source.name}: {source.model}",
        _header(source),
        _state(source),
        _key_figures(source),
        linear_sections.heat_map(found, source.report.get("not_targeted", ())),
        experts_map(source.report, found),
        linear_sections.budget(found),
        searched_plans(source.report.get("search", {})),
        linear_sections.rank_curves(found, source.rank_shares),
        linear_sections.density_curves(found, source.density_shares),
        evaluation_section(source.evaluations, "Before and after"),
        speeds(source.speed),
        _timings(source.report.get("timings", {})),
        memory(source.report.get("timings", {})),
        _recipe(source),
        linear_sections.numerics(found),
        _further(source.report),
        happened(source.events),
        _missing(source),
        linear_sections.every_linear(found),
        _footer(source),
    )


def _header(source: Source) -> Markup:
    made = source.recipe.get("method", "an unnamed method")
    allocation = source.recipe.get("allocation")
    by = f", budget divided by {allocation}" if allocation not in (None, made) else ""
    model = source.model.rstrip("/").rpartition("/")[2]
    return joined(
        [
            element("h1", source.name),
            element("p", f"{model}, compressed with {made}{by}", class_="soft"),
        ]
    )


def _state(source: Source) -> Markup | None:
    """Summary of a run that is not finished."""
    state = source.status.get("state")
    if source.is_done and state in (None, "done"):
        return None
    status = source.status
    says = f"This run is not finished: {state or 'unknown'}"
    if "exit_code" in status:
        says += f", exit code {status['exit_code']}"
    if "stage" in status:
        says += f", in stage {status['stage']}"
    if "done" in status and "total" in status:
        says += f", {status['done']} of {counted(status['total'], 'unit')}"
    if "error" in status:
        says += f". {status['error']}"
    if source.is_done:
        says += ". The checkpoint in its output directory is complete; the page shows it"
    else:
        says += ". The page shows its results so far"
    return element("p", f"{says}.", class_="said")


def _key_figures(source: Source) -> Markup | None:
    kept, values = source.report.get("kept", {}), source.report.get("values", {})
    shown: list[tuple[str, str, str]] = []
    if "linears" in kept:
        asked = f", requested {kept['asked']:g}" if "asked" in kept else ""
        if kept.get("asked_of") in ("operations", "time"):
            asked += f" of {kept['asked_of']}"
        in_bytes = kept_bytes(source.report) if kept.get("asked_of") == "bytes" else None
        if in_bytes is not None:
            name = "kept fraction of the targeted linears, in bytes"
            shown.append((name, tables.fraction(in_bytes), asked.removeprefix(", ")))
        name = "kept fraction of the targeted linears"
        said = "of values" if in_bytes is not None else f"of values{asked}"
        shown.append((name, tables.fraction(kept["linears"]), said))
    else:
        for name, of in KEPT_OF.items():
            if source.recipe.get(name) is not None:
                said = f"of the targeted linears' {of}"
                shown.append(("requested kept fraction", f"{source.recipe[name]:g}", said))
    if "model" in kept:
        shown.append(("kept fraction of the whole model", tables.fraction(kept["model"]), ""))
    if "model_after" in values:
        before = values.get("model_before")
        said = f"{before:,} before" if before is not None else ""
        shown.append(("parameters", tables.count(values["model_after"]), said))
    if "stored" in values and "budget" in values:
        is_in_values = kept.get("asked_of", "values") == "values"
        slack = values["budget"] - values["stored"]
        said = f"{slack:,} below the budget" if is_in_values else ""
        shown.append(("values of the linears", tables.count(values["stored"]), said))
    if multiples := rank_multiples(source.report):
        shown.append(("ranks", *multiples))
    texts = forecast_texts(speed_forecast(source.report))
    shown += [(name, found, says) for name, (found, says) in texts.items()]
    linear_bytes = source.report.get("bytes", {})
    if "stored" in linear_bytes:
        before = linear_bytes.get("dense_linears")
        said = f"{size(before)} before" if before is not None else ""
        shown.append(("bytes of the linears", size(linear_bytes["stored"]), said))
    if bits := bits_texts(source.report):
        shown.append(("bits per weight of the linears", *bits))
    if source.out_bytes is not None:
        said = f"{size(source.dense_bytes)} before" if source.dense_bytes is not None else ""
        shown.append(("weights on disk", size(source.out_bytes), said))
    for facts in source.text_evaluations[:1]:
        ours, dense = (facts["models"].get(name, {}) for name in ("model", "against"))
        if ours.get("perplexity") is not None:
            before = dense.get("perplexity")
            said = f"{before:.2f} before" if before is not None else ""
            shown.append(("perplexity", f"{ours['perplexity']:.2f}", said))
    items = (
        element("div", element("dt", name), element("dd", text, element("small", said)))
        for name, text, said in shown
    )
    return element("dl", *items, class_="key") if shown else None


def _timings(timings: Mapping[str, Any]) -> Markup | None:
    seconds = timings.get("seconds", {})
    if not seconds:
        return None
    whole = sum(seconds.values()) or 1.0
    busy = timings.get("busy", {})
    rows = [
        [
            row_head(stage),
            number(duration(took), took),
            number(f"{busy[stage]:.0%}" if stage in busy else "", busy.get(stage)),
            number(f"{took / whole:.1%}"),
            tables.bar(took / whole),
        ]
        for stage, took in seconds.items()
    ]
    together = [row_head("together"), number(duration(whole), whole), number(""), number("")]
    rows.append([*together, cell("")])
    heads = [head("stage"), head("wall time", "n"), head("workers busy", "n"), head("share", "n")]
    heads.append(head("", "bar"))
    said: dict[str, Any] = {}
    if "decompose_seconds" in timings:
        said["decompositions, over all workers"] = duration(timings["decompose_seconds"])
    said |= {name: timings[name] for name in ("workers", "nodes") if name in timings}
    said |= timings.get("environment", {})
    return section(
        "Time",
        element(
            "div",
            tables.table(heads, rows, label="wall time by stage"),
            tables.pairs(said, label="machines") if said else None,
            class_="beside",
        ),
    )


def _recipe(source: Source) -> Markup | None:
    if not source.recipe:
        return None
    what = {name: value for name, value in source.recipe.items() if name not in SCHEDULE}
    where = {name: value for name, value in source.recipe.items() if name in SCHEDULE}
    where |= source.report.get("timings", {}).get("schedule", {})
    right = [
        _part("Execution settings, without effect on the result", where),
        _part("Calibration data", _texts(source.report.get("calibration", {}))),
    ]
    return section(
        "Recipe",
        element(
            "div",
            element("div", _part("Recipe", tables.flat(what))),
            element("div", *right),
            class_="beside",
        ),
    )


def _texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a text, with one row for each source of it."""
    rows = {name: value for name, value in values.items() if name != "sources"}
    sources = values.get("sources", [])
    for place, each in enumerate(sources if isinstance(sources, list) else [], start=1):
        if isinstance(each, Mapping):
            facts = [f"{name} {tables.plain(value)}" for name, value in each.items()]
            rows[f"source {place}"] = ", ".join(facts)
    return rows


def _part(title: str, values: Mapping[str, Any]) -> Markup | None:
    if not values:
        return None
    heading = element("h3", title, class_="plain")
    return joined([heading, tables.pairs(values, label=title)])


def _further(report: Mapping[str, Any]) -> Markup | None:
    """Section with further fields of the report."""
    further = tables.flat({name: each for name, each in report.items() if name not in KNOWN})
    if not further:
        return None
    return section("Also reported", tables.pairs(further, label="also reported"))


def _missing(source: Source) -> Markup | None:
    """Section with fields that are missing."""
    remarks = list(source.remarks)
    if source.report:
        absent = [name for path, name in WANTED.items() if not _has(source.report, path)]
        if absent:
            remarks.append(f"The report has no: {', '.join(absent)}.")
        facts = source.report.get("linears", {}).values()
        for field in ("shape", "form", "values", "weight_error", "activation_error"):
            lacking = sum(each.get(field) is None for each in facts)
            if lacking:
                have = "has" if lacking == 1 else "have"
                lacks = f"{counted(lacking, 'linear')} {have} no reported"
                remarks.append(f"{lacks} {field.replace('_', ' ')}.")
        if source.run is not None and not any((source.rank_shares, source.density_shares)):
            remarks.append("The run directory has no curves to draw.")
        if not source.evaluations:
            remarks.append(
                "No evaluation found beside the checkpoint: `orchestrator evaluate OUT --against "
                "MODEL --text FILE` adds one."
            )
    if not remarks:
        return None
    return section("Left out", element("ul", *(element("li", each) for each in remarks)))


def _has(report: Mapping[str, Any], path: str) -> bool:
    value: Any = report
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _footer(source: Source) -> Markup:
    said = [f"Made by orchestrator {__version__}"]
    if "producer" in source.report:
        said.append(f"from a report by {source.report['producer']}")
    if source.out is not None:
        said.append(f"checkpoint {source.out}")
    if source.run is not None:
        said.append(f"run directory {source.run}")
    if "key" in source.report:
        said.append(f"key {source.report['key']}")
    return element("footer", "; ".join(said), ".")
