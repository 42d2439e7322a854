"""A search over settings: every candidate compressed and evaluated on held-out text, the best kept.

Reconstruction errors say little about which setting makes the better model; its perplexity on text
that nothing was calibrated on does. Candidates share a run directory, so what they have in common
(statistics, decompositions) is computed once, and each is a distributed compression and evaluation
of its own, over all workers.
"""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, UsageError
from orchestrator.plan.result import Result
from orchestrator.recipe.options import check_known
from orchestrator.recipe.recipe import SCHEDULE, Recipe
from orchestrator.store.files import digest_json, parse_json, write_json
from orchestrator.store.places import Remote, parse_place

EVALUATION_SCHEDULE = ("executor", "address", "workers", "threads", "shards", "allow_mixed")
Setting = Mapping[str, Any]
"""Values by what they are of: a field of the recipe, `storage`, or an option, `two-sided.dense`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One setting and what came of it."""

    setting: Setting
    perplexity: float
    """Of the compressed model on the held-out text."""
    kept: float
    """Part of the targeted linears' values that is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """All candidates in the order in which they were tried."""

    result: Result
    """Of the best one, in the recipe's `out`."""
    best: Candidate
    candidates: tuple[Candidate, ...]


def search(
    recipe: Recipe,
    vary: Mapping[str, Sequence[Any]],
    *,
    text: str,
    compress: Callable[..., Result],
    evaluate: Callable[..., dict[str, Any]],
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **evaluation: Any,
) -> Search:
    """Tries every combination of the values given, and writes the best one to the recipe's `out`.

    What came of each candidate is a small file in `OUT.search`, so a search that was stopped and
    is asked for again tries only what is left; the candidate itself is removed when it has been
    evaluated, and the best one cut again from what the run directory holds. Of equals the first
    wins.

    Args:
        recipe: What all candidates share.
        vary: Values to try by field (`storage`) or option (`two-sided.dense`).
        text: Held-out text that decides; not the calibration text.
        compress, evaluate: The functions of `orchestrator.api`.
        evaluation: As `orchestrator.evaluate` takes them: `samples`, `sequence_length`, `stride`,
            `field`, `layout`.

    Raises:
        UsageError: A name is no field or option, or no value is given; the text is the calibration
            text.
        OrchestratorError: As `compress` and `evaluate`.
    """
    if text == recipe.calibration:
        raise UsageError(
            f"text: {text} is the calibration text, on which every candidate looks too good; "
            "give text that nothing was calibrated on"
        )
    if isinstance(parse_place(recipe.out), Remote):
        raise UsageError(
            f"out: {recipe.out} is not on local disk, where the candidates are evaluated; "
            "search there, and copy what it finds"
        )
    given = {"text": text, **evaluation}
    schedule = {name: getattr(recipe, name) for name in (*EVALUATION_SCHEDULE, "dtype")}
    recipe = replace(recipe, run_dir=recipe.run_dir or f"{recipe.out}.run")
    recipes = {setting: with_setting(recipe, dict(setting)) for setting in settings(vary)}
    directory = Path(f"{recipe.out}.search")
    tried: list[Candidate] = []
    for setting, candidate in recipes.items():
        name = digest_json({"recipe": candidate.to_toml(schedule=False), "given": given})[:16]
        found = directory / f"{name}.json"
        if not found.exists():
            out = directory / name
            result = compress(replace(candidate, out=str(out)), on_event)
            report = evaluate(out, on_event=on_event, **schedule, **given)
            value = {
                "setting": dict(setting),
                "perplexity": report["models"]["model"]["perplexity"],
                "kept": result.report["kept"]["linears"],
            }
            write_json(found, value)
            for spent in (out, Path(f"{out}.evaluation")):
                shutil.rmtree(spent)
        tried.append(_read_candidate(found, dict(setting)))
    best = min(tried, key=lambda each: each.perplexity)
    chosen = recipes[tuple(best.setting.items())]
    return Search(result=compress(chosen, on_event), best=best, candidates=tuple(tried))


def _read_candidate(path: Path, setting: Setting) -> Candidate:
    try:
        found = parse_json(path.read_bytes())
        perplexity, kept = float(found["perplexity"]), float(found["kept"])
    except (OSError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is damaged, remove it: {error}") from error
    return Candidate(setting=setting, perplexity=perplexity, kept=kept)


def settings(vary: Mapping[str, Sequence[Any]]) -> list[tuple[tuple[str, Any], ...]]:
    """Every combination of the values, the last name's changing fastest.

    Raises:
        UsageError: Nothing is varied, or a name has no values.
    """
    for name, values in vary.items():
        if not values:
            raise UsageError(f"vary: {name} has no values; write it like storage=plain,pivoted")
    if not vary:
        raise UsageError("vary: nothing to search over; write it like storage=plain,pivoted")
    return [tuple(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def with_setting(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with these values: `storage` is a field, `mgaa.t` an option.

    Raises:
        UsageError: A name is none that a search may vary, or a value is not allowed.
    """
    varied = [field.name for field in fields(Recipe) if field.name not in (*SCHEDULE, "options")]
    options = {name: dict(table) for name, table in recipe.options.items()}
    replaced = {}
    for name, value in setting.items():
        table, dot, option = name.partition(".")
        if dot:
            options.setdefault(table, {})[option] = value
        else:
            check_known("vary", {name: value}, varied)
            replaced[name] = value
    return replace(recipe, options=options, **replaced)
