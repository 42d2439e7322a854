"""Search over settings: compresses every candidate, evaluates it on held-out text, keeps the best.

Reconstruction errors hardly predict which setting gives the better model; the perplexity on
held-out text does. Candidates share a run directory, so common results (statistics, decompositions)
are computed once. Each candidate is a distributed compression and evaluation over all workers.
"""

import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, UsageError
from orchestrator.plan.result import Result
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import described
from orchestrator.recipe.options import check_known
from orchestrator.recipe.recipe import SCHEDULE, Recipe
from orchestrator.resolve import unused_options, without_options
from orchestrator.store.files import digest_json, parse_json, write_json
from orchestrator.store.places import Remote, parse_place
from orchestrator.store.run import CANDIDATES

Setting = Mapping[str, Any]
"""Values by field of the recipe (`storage`) or option (`two-sided.dense`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One setting and its result."""

    setting: Setting
    perplexity: float
    """Perplexity of the compressed model on the held-out text."""
    kept: float
    """Stored values of the targeted linears over their dense values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """All candidates, in the order of evaluation."""

    result: Result
    """Result of the best candidate, in the recipe's `out`."""
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
    """Try every combination of the given values, and write the best one to the recipe's `out`.

    The result of each candidate is a small file in `OUT.search`, so a repeated search evaluates
    only the remaining candidates. The candidate itself is removed after its evaluation; the best
    one is made again from the run directory. Ties: the first one.

    Args:
        recipe: Settings common to all candidates.
        vary: Values to try by field (`storage`) or option (`two-sided.dense`).
        text: Held-out text for the evaluation; not the calibration text.
        compress, evaluate: The functions of `orchestrator.api`.
        evaluation: Arguments of `orchestrator.evaluate`: `samples`, `sequence_length`, `stride`,
            `field`, `layout`.

    Raises:
        UsageError: A name is not a field or an option, or has no value; the text is the calibration
            text.
        OrchestratorError: As `compress` and `evaluate`.
    """
    _check_local_and_held_out(recipe, text)
    given = {"text": text, **evaluation}
    same = {*described(Execution), "dtype"} - {"run_dir"}
    schedule = {name: getattr(recipe, name) for name in same}
    recipe = replace(recipe, run_dir=recipe.run_dir or f"{recipe.out}.run")
    recipes = candidates_of(recipe, vary)
    directory = Path(f"{recipe.out}{CANDIDATES}")
    tried: list[Candidate] = []
    for number, (setting, candidate) in enumerate(recipes.items(), start=1):
        name = digest_json({"recipe": candidate.to_toml(schedule=False), "given": given})[:16]
        found = directory / f"{name}.json"
        known = ", evaluated by an earlier search" if found.exists() else ""
        _announce(f"combination {number} of {len(recipes)}", setting, known, on_event)
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
    _announce("best combination", best.setting.items(), "", on_event)
    return Search(result=compress(chosen, on_event), best=best, candidates=tuple(tried))


def _announce(
    heading: str,
    setting: Iterable[tuple[str, Any]],
    remark: str,
    on_event: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Emit the heading of the events of one combination, `... storage=pivoted mgaa.t=0.5`."""
    if on_event is not None:
        values = " ".join(f"{name}={value}" for name, value in setting)
        on_event({"event": "note", "text": f"{heading}: {values}{remark}"})


def candidates_of(
    recipe: Recipe, vary: Mapping[str, Sequence[Any]]
) -> dict[tuple[tuple[str, Any], ...], Recipe]:
    """Return the recipe of every combination, by its setting.

    An option that has an effect in some of them, because the method varies, is left out of the
    others; one without effect in all of them stays, and is refused by `compress`.

    Raises:
        UsageError: As `settings` and `with_setting`, or a recipe cannot be resolved.
    """
    recipes = {setting: with_setting(recipe, dict(setting)) for setting in settings(vary)}
    unused = {setting: unused_options(each) for setting, each in recipes.items()}
    pairs = [{(t, o) for t in each for o in each[t]} for each in unused.values()]
    nowhere = set.intersection(*pairs)
    return {
        setting: without_options(
            each,
            {t: [o for o in unused[setting][t] if (t, o) not in nowhere] for t in unused[setting]},
        )
        for setting, each in recipes.items()
    }


def _check_local_and_held_out(recipe: Recipe, text: str) -> None:
    """Raise UsageError if the text is the calibration text, or the output is not on local disk."""
    if text == recipe.calibration:
        raise UsageError(
            f"text: {text} is the calibration text, which favours every candidate; "
            "give held-out text"
        )
    if isinstance(parse_place(recipe.out), Remote):
        raise UsageError(
            f"out: {recipe.out} is not on local disk, where the candidates are evaluated; "
            "search on local disk, and copy the result"
        )


def _read_candidate(path: Path, setting: Setting) -> Candidate:
    try:
        found = parse_json(path.read_bytes())
        perplexity, kept = float(found["perplexity"]), float(found["kept"])
    except (OSError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is damaged; remove it: {error}") from error
    return Candidate(setting=setting, perplexity=perplexity, kept=kept)


def settings(vary: Mapping[str, Sequence[Any]]) -> list[tuple[tuple[str, Any], ...]]:
    """Return all combinations of the values; the last name varies fastest.

    Raises:
        UsageError: No name is given, or a name has no values.
    """
    for name, values in vary.items():
        if not values:
            raise UsageError(f"vary: {name} has no values; write it like storage=plain,pivoted")
    if not vary:
        raise UsageError("vary: no values given; write it like storage=plain,pivoted")
    return [tuple(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def with_setting(recipe: Recipe, setting: Setting) -> Recipe:
    """Return the recipe with these values: `storage` is a field, `mgaa.t` an option.

    Raises:
        UsageError: A search cannot vary this name, or a value is not allowed.
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
