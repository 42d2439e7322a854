"""Page that compares runs: every table has one row per run, in the same order."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.pages import figures, tables
from orchestrator.pages.evaluations import (
    AGREEMENT,
    QUANTITIES,
    against_base,
    score,
    task_key,
    task_rows,
    text_of,
)
from orchestrator.pages.linears import by_role, entries, kept_of
from orchestrator.pages.markup import Markup, element, page, section, write_page
from orchestrator.pages.retention import retention_section
from orchestrator.pages.sources import Source, read_source, whole
from orchestrator.pages.tables import DASH, cell, head, number, row_head
from orchestrator.plan.result import bits_per_weight, compression_rates
from orchestrator.readable import duration
from orchestrator.recipe.recipe import SCHEDULE
from orchestrator.store.places import Place
from orchestrator.version import __version__


def write_comparison(runs: Sequence[Place], output: Place | None = None) -> Place:
    """Write the page that compares run directories or checkpoints; returns its path.

    Args:
        output: The file; None means `comparison.html` in the working directory.

    Raises:
        InputError: A place is neither a run nor a checkpoint, or one of its files is damaged.
        UsageError: Fewer than two places are given, or `output` is a directory.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run given; name two or more to compare")
    sources = []
    for run in runs:
        with whole(run):
            sources.append(read_source(run))
    with whole(runs[0].parent):
        content = comparison_page(sources)
    return write_page(output or Path("comparison.html").absolute(), content)


def comparison_page(sources: Sequence[Source]) -> Markup:
    """Compose the page."""
    names = _names(sources)
    return page(
        f"Comparison of {len(sources)} runs",
        element("h1", f"Comparison of {len(sources)} runs"),
        element("p", ", ".join(names), class_="soft"),
        *_unfinished(names, sources),
        _differences(names, sources),
        _sizes(names, sources),
        *_evaluations(names, sources),
        _tasks(names, sources),
        retention_section(names, sources),
        _kept_by_role(names, sources),
        _timings(names, sources),
        _left_out(names, sources),
        _footer(names, sources),
    )


def _names(sources: Sequence[Source]) -> list[str]:
    """Return the shortest suffixes of the paths that distinguish the runs."""
    paths = [str(source.out or source.place).split("/") for source in sources]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({n})" for n, name in enumerate(names, start=1)]


def _unfinished(names: Sequence[str], sources: Sequence[Source]) -> Iterator[Markup]:
    for name, source in zip(names, sources, strict=True):
        state = source.status.get("state", "unknown")
        if not source.is_done:
            says = f"{name} is not finished: {state}. The page shows its results so far."
            yield element("p", says, class_="said")


def _differences(names: Sequence[str], sources: Sequence[Source]) -> Markup:
    """Table of the recipe fields that differ between runs."""
    recipes = [tables.flat(source.recipe) for source in sources]
    fields = [
        name
        for name in dict.fromkeys(name for recipe in recipes for name in recipe)
        if name not in SCHEDULE
        and len({json.dumps(recipe.get(name), sort_keys=True) for recipe in recipes}) > 1
    ]
    if not fields:
        return section("Recipes", element("p", "All recipes are equal."))
    rows = [
        [row_head(name), *(cell(tables.plain(recipe.get(field))) for field in fields)]
        for name, recipe in zip(names, recipes, strict=True)
    ]
    return section(
        "Recipes",
        element("p", "Fields that differ between the recipes; all others are equal."),
        tables.table([head("run"), *map(head, fields)], rows, label="recipe differences"),
    )


def _sizes(names: Sequence[str], sources: Sequence[Source]) -> Markup | None:
    rows = []
    for name, source in zip(names, sources, strict=True):
        kept, values = source.report.get("kept", {}), source.report.get("values", {})
        in_linears = source.report.get("bytes", {}).get("stored")
        bits, rates = bits_per_weight(source.report), compression_rates(source.report)
        rows.append(
            [
                row_head(name),
                *(number(tables.fraction(kept.get(k)), kept.get(k)) for k in ("linears", "model")),
                *(
                    number(tables.count(values.get(k)), values.get(k))
                    for k in ("stored", "slack", "model_after")
                ),
                number(tables.count(in_linears), in_linears),
                number(DASH if bits is None else f"{bits:.3f}", bits),
                *(number(DASH if r is None else f"{r:.1%}", r) for r in rates or (None, None)),
                number(tables.count(source.out_bytes), source.out_bytes),
            ]
        )
    named = (
        *("kept of the linears", "kept of the model", "values of the linears", "below the budget"),
        *("parameters", "bytes of the linears", "bits per weight", "compression rate"),
        *("compression rate without indices", "bytes of the weights"),
    )
    heads = [head("run"), *(head(each, "n") for each in named)]
    return section("Size", tables.table(heads, rows, label="size", is_sortable=True))


def _evaluations(names: Sequence[str], sources: Sequence[Source]) -> Iterator[Markup]:
    """Sections by text: only measurements on the same tokens share a table."""
    texts: dict[str, list[tuple[str, Source, Mapping[str, Any]]]] = {}
    for name, source in zip(names, sources, strict=True):
        for facts in map(_within, source.text_evaluations):
            same = json.dumps([facts.get("text"), facts.get("predictions")], sort_keys=True)
            texts.setdefault(same, []).append((name, source, facts))
    several = len(texts) > 1
    for n, measured in enumerate(texts.values(), start=1):
        says = text_of(measured[0][2])
        yield section(
            f"Quality and speed, text {n}" if several else "Quality and speed",
            element("p", f"{says}."),
            _quality(measured),
            _scatter(measured),
        )


def _tasks(names: Sequence[str], sources: Sequence[Source]) -> Markup | None:
    """Table of the metrics of tasks: the dense model in the first row, then each run."""
    found = {
        name: {task_key(row): row for row in task_rows(source.evaluations)}
        for name, source in zip(names, sources, strict=True)
    }
    keys = list(dict.fromkeys(key for rows in found.values() for key in rows))
    if not keys:
        return None
    bases = {source.report.get("base_fingerprint") for source in sources}
    rows = []
    if len(bases) == 1:
        # equal tasks of one dense model have equal values
        known = [(k, r.get("against")) for each in found.values() for k, r in each.items()]
        dense = {key: value for key, value in known if value is not None}
        rows.append([row_head("dense"), *(score(dense.get(key)) for key in keys)])
    for name, own in found.items():
        scores = (score(own.get(key, {}).get("model")) for key in keys)
        rows.append([row_head(name), *scores])
    heads = [head("run"), *(head(key, "n") for key in keys)]
    return section("Tasks", tables.table(heads, rows, label="tasks", is_sortable=True))


def _within(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Measurements without those against a model that is not the one that was compressed."""
    if against_base(facts):
        return facts
    models = {"model": facts["models"]["model"]}
    return {**{n: v for n, v in facts.items() if n not in AGREEMENT}, "models": models}


def _quality(measured: Sequence[tuple[str, Source, Mapping[str, Any]]]) -> Markup:
    """Table of quality and speed. The speed of the dense model varies between evaluations, so it is
    only used as a divisor."""
    shown = {**QUANTITIES, **AGREEMENT}
    speeds = [name for name in QUANTITIES if name.endswith("per_second")]
    rows = []
    dense = next((f["models"]["against"] for *_, f in measured if "against" in f["models"]), None)
    if dense is not None:
        known = {name: value for name, value in dense.items() if name not in speeds}
        rows.append([row_head("dense"), *_cells(shown, known), *[number(DASH)] * len(speeds)])
    for name, _, facts in measured:
        ours, against = facts["models"]["model"], facts["models"].get("against", {})
        gains = [
            ours[speed] / against[speed] if ours.get(speed) and against.get(speed) else None
            for speed in speeds
        ]
        shares = (number(DASH if gain is None else f"{gain:.2f} ×", gain) for gain in gains)
        rows.append([row_head(name), *_cells(shown, {**facts, **ours}), *shares])
    labels = [label for label, _ in shown.values()]
    labels += [f"{name.partition('_')[0]}, times dense" for name in speeds]
    heads = [head("run"), *(head(label, "n") for label in labels)]
    return tables.table(heads, rows, label="quality and speed", is_sortable=True)


def _cells(
    shown: Mapping[str, tuple[str, Callable[[Any], str]]], facts: Mapping[str, Any]
) -> Iterator[Markup]:
    for name, (_, words) in shown.items():
        value = facts.get(name)
        yield number(DASH if value is None else words(value), value)


def _scatter(measured: Sequence[tuple[str, Source, Mapping[str, Any]]]) -> Markup | None:
    points = [
        figures.Point(
            name, source.report["kept"]["linears"], facts["models"]["model"]["perplexity"]
        )
        for name, source, facts in measured
        if source.report.get("kept", {}).get("linears") is not None
        and (facts["models"]["model"].get("perplexity") or 0) > 0
    ]
    if not points:
        return None
    dense = [facts["models"].get("against", {}).get("perplexity") for *_, facts in measured]
    level = next((each for each in dense if each), None)
    drawn = figures.scatter(points, level=level, label="perplexity against kept fraction")
    return element(
        "figure",
        drawn,
        element("figcaption", "Perplexity (logarithmic scale) against kept fraction."),
    )


def _kept_by_role(names: Sequence[str], sources: Sequence[Source]) -> Markup | None:
    kept = [
        {role: kept_of(same) for role, same in by_role(entries(source.report)).items()}
        for source in sources
    ]
    roles = list(dict.fromkeys(role for each in kept for role in each))
    if not roles:
        return None
    rows = [
        [row_head(name), *(number(tables.fraction(each.get(r)), each.get(r)) for r in roles)]
        for name, each in zip(names, kept, strict=True)
    ]
    heads = [head("run"), *(head(tables.breakable(role), "n id") for role in roles)]
    return section(
        "Kept by role", tables.table(heads, rows, label="kept by role", is_sortable=True)
    )


def _timings(names: Sequence[str], sources: Sequence[Source]) -> Markup | None:
    seconds = [source.report.get("timings", {}).get("seconds", {}) for source in sources]
    stages = list(dict.fromkeys(stage for each in seconds for stage in each))
    if not stages:
        return None
    rows = []
    for name, took in zip(names, seconds, strict=True):
        whole = sum(took.values()) if took else None
        times = [*(took.get(stage) for stage in stages), whole]
        shown = (number(DASH if t is None else duration(t), t) for t in times)
        rows.append([row_head(name), *shown])
    heads = [head("run"), *(head(stage, "n") for stage in (*stages, "together"))]
    return section(
        "Time",
        element("p", "Wall time of each stage; results committed by an earlier run take no time."),
        tables.table(heads, rows, label="wall time by stage", is_sortable=True),
    )


def _left_out(names: Sequence[str], sources: Sequence[Source]) -> Markup | None:
    said = [
        f"{name}: {remark}"
        for name, source in zip(names, sources, strict=True)
        for remark in (
            *source.remarks,
            *(() if source.evaluations else ("No evaluation found beside the checkpoint.",)),
        )
    ]
    if not said:
        return None
    return section("Left out", element("ul", *(element("li", each) for each in said)))


def _footer(names: Sequence[str], sources: Sequence[Source]) -> Markup:
    places = (f"{n}: {s.place}" for n, s in zip(names, sources, strict=True))
    return element("footer", f"Made by orchestrator {__version__}; {', '.join(places)}.")
