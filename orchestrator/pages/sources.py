"""Sources of a page: a run directory, the checkpoint that it names, and evaluations.

One of the first two is required, everything else is optional. Sources that are missing, or belong
to another checkpoint, are listed in `remarks`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import InputError
from orchestrator.pages.happened import UNLISTED
from orchestrator.plan.curve import Curve
from orchestrator.plan.result import BENCH_SUFFIX, REPORT_FILE, read_report
from orchestrator.readable import counted
from orchestrator.recipe.recipe import SCHEDULE, Recipe
from orchestrator.store.files import parse_json, size_of
from orchestrator.store.places import Place, parse_place
from orchestrator.store.run import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One compression, possibly unfinished."""

    place: Place
    """The given directory."""
    out: Place | None
    """The checkpoint, written or not."""
    run: Place | None
    """The run directory, if any."""
    status: Mapping[str, Any]
    """Empty if no run directory belongs to this checkpoint."""
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    """Empty until the checkpoint is finished."""
    rank_shares: Mapping[str, np.ndarray]
    """By linear: energy fraction of the leading 1, 2, ... ranks."""
    density_shares: Mapping[str, np.ndarray]
    """By sparse linear: energy fraction at equally spaced densities, the last one 1."""
    evaluations: Sequence[Mapping[str, Any]]
    speed: Mapping[str, Any]
    """Times that `bench` has written beside the checkpoint; empty if there are none."""
    events: Sequence[Mapping[str, Any]]
    """Events other than stages and units."""
    out_bytes: int | None
    dense_bytes: int | None
    remarks: Sequence[str]

    @property
    def name(self) -> str:
        """Name of the checkpoint directory, else of the run directory."""
        return (self.out or self.place).name

    @property
    def model(self) -> str:
        """The dense model as named in the recipe."""
        return str(self.recipe.get("model", "an unnamed model"))

    @property
    def text_evaluations(self) -> list[Mapping[str, Any]]:
        """Evaluations on a text; the others are on tasks alone."""
        return [facts for facts in self.evaluations if "text" in facts or "tasks" not in facts]

    @property
    def is_done(self) -> bool:
        return bool(self.report)


@contextmanager
def whole(place: Place) -> Iterator[None]:
    """Convert errors of the body into InputError: files of a run are well-formed.

    Hashes reveal damage of a manifest, but not who wrote it.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]!r}"
        raise InputError(
            f"{place}: was not written by orchestrator, or is damaged: {said}"
        ) from error


def read_source(place: Place) -> Source:
    """Read a run directory or a compressed checkpoint.

    The run directory of a checkpoint is the one named in its report, else `OUT.run`.

    Raises:
        InputError: The place is neither of the two, or one of its files cannot be read.
    """
    place = place.expanduser().absolute()
    out: Place | None
    run: Place | None
    if (place / REPORT_FILE).is_file():
        out, report = place, read_report(place)
        run, description = _run_of(place, report)
    else:
        run, description = place, RunDirectory(place).description()
        if "recipe" not in description:
            raise InputError(
                f"{place}: is not a run of `compress`; name the run directory of a compression"
            )
        out = parse_place(description["out"]) if description.get("out") else None
        report = read_report(out) if out and (out / REPORT_FILE).is_file() else {}
    speaks_of_out = run is not None and description.get("out") in (None, str(out))
    status = RunDirectory(run).status() if run and speaks_of_out else {}
    asked = description.get("recipe", {}) if speaks_of_out else {}
    remarks = _remarks(asked, report, run)
    units = list(unit_facts(run)) if run else []
    ranks, densities, left_out = _curves(units, report.get("linears", {}))
    out_bytes = _weight_bytes(out)
    evaluations, stale = _evaluations(out, out_bytes)
    dense = description.get("model") or report.get("recipe", {}).get("model")
    return Source(
        place=place,
        out=out,
        run=run,
        status=status,
        recipe=_in_order({**asked, **report.get("recipe", {})}),
        report=report,
        rank_shares=ranks,
        density_shares=densities,
        evaluations=evaluations,
        speed=_speed(out),
        events=list(told_events(run)) if run and speaks_of_out else [],
        out_bytes=out_bytes if report else None,
        dense_bytes=_weight_bytes(Path(dense)) if dense else None,
        remarks=[*remarks, *left_out, *stale],
    )


def _run_of(out: Place, report: Mapping[str, Any]) -> tuple[Place | None, dict[str, Any]]:
    """Return the run directory of a checkpoint, and its description."""
    named = report.get("timings", {}).get("schedule", {}).get("run_dir")
    run = parse_place(named).absolute() if named else out.with_name(f"{out.name}.run")
    return (run, RunDirectory(run).description()) if (run / "run.json").is_file() else (None, {})


def _in_order(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the fields as in a recipe; unknown fields come last."""
    known = [field.name for field in fields(Recipe)]
    names = [*(name for name in known if name in recipe), *(recipe.keys() - set(known))]
    return {name: recipe[name] for name in dict.fromkeys(names)}


def _remarks(
    asked: Mapping[str, Any], report: Mapping[str, Any], run: Place | None
) -> Iterator[str]:
    made = report.get("recipe", {})
    # the report names the method's default allocation, the recipe may leave it unset
    differ = [
        name
        for name, value in made.items()
        if name in asked and name not in SCHEDULE and asked[name] not in (value, None)
    ]
    if differ:
        yield (
            "The recipe of the checkpoint differs from that of the run directory "
            f"({', '.join(differ)}); the page shows the checkpoint."
        )
    if run is None:
        yield "No run directory found: curves and journal are not shown."


def unit_facts(run: Place) -> Iterator[dict[str, Any]]:
    """Yield the facts of every committed unit."""
    units = RunDirectory(run).units
    for key in units.begun():
        manifest = units.manifest(key)
        if manifest is not None:
            yield manifest["facts"]


def _curves(
    units: Sequence[Mapping[str, Any]], linears: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Read the energy fractions of each linear from the units of decompositions.

    A run directory may contain the decompositions of several methods or texts. Then the curve of a
    linear is taken from the unit whose error at the chosen rank equals that of the report. Linears
    with a shared basis have one curve, under the name of the first.

    Returns:
        Energy fractions of the leading 1, 2, ... ranks; energy fractions at equally spaced
            densities, the last one 1; remarks.
    """
    found: dict[tuple[str, bool], list[tuple[np.ndarray, bool]]] = {}
    for facts in units:
        results = facts.get("linears", ())
        if isinstance(results, Mapping):
            continue  # by name: compensations of a walk, not decompositions
        agrees = all(_agrees(result, linears) for result in results)
        for result in results:
            is_sparse = "activation_losses" in result
            shares = _density_shares(result) if is_sparse else _rank_shares(result)
            if shares is not None:
                key = (result["curve"]["name"], is_sparse)
                found.setdefault(key, []).append((shares, agrees))
    chosen = {}
    for key, several in found.items():
        curves = [shares for shares, agrees in several if agrees or len(several) == 1]
        # the same decomposition may have been computed more than once
        if curves and all(np.array_equal(shares, curves[0]) for shares in curves):
            chosen[key] = curves[0]
    unclear = len(found) - len(chosen)
    remark = (
        f"The run directory has several decompositions of {counted(unclear, 'linear')}, and the "
        "report does not determine which one was used; their curves are omitted."
    )
    ranks = {name: shares for (name, is_sparse), shares in chosen.items() if not is_sparse}
    densities = {name: shares for (name, is_sparse), shares in chosen.items() if is_sparse}
    return ranks, densities, [remark] if unclear else []


def _rank_shares(result: Mapping[str, Any]) -> np.ndarray | None:
    """Return the curve of a low-rank decomposition, in the method's norm."""
    if "weight_energies" not in result:
        return None
    curve = Curve.from_json(result["curve"])
    return _sound(np.cumsum(curve.energies), curve.total)


def _density_shares(result: Mapping[str, Any]) -> np.ndarray | None:
    """Return the curve of a weight pruned by entries, in the norm of its outputs."""
    losses = np.asarray(result["activation_losses"], dtype=np.float64)
    return _sound(losses[0] - losses[1:], float(losses[0]))


def _sound(held: np.ndarray, total: float) -> np.ndarray | None:
    if not total > 0 or len(held) < 2 or not np.isfinite(held).all():
        return None
    return np.clip(held / total, 0.0, 1.0)


def _agrees(result: Mapping[str, Any], linears: Mapping[str, Any]) -> bool:
    """Return True if a decomposition has the reported error at the reported rank."""
    entry = linears.get(result.get("curve", {}).get("name"), {})
    rank, error, total = entry.get("rank"), entry.get("weight_error"), result.get("weight_total")
    if not (rank and total) or error is None:
        return True
    lost = 1.0 - float(np.sum(result.get("weight_energies", ())[:rank])) / total
    return math.isclose(lost, error, rel_tol=1e-6, abs_tol=1e-9)


def _evaluations(
    out: Place | None, out_bytes: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the results of `evaluate` for the checkpoint from run directories beside it.

    `OUT.evaluation` is found by its name, other directories by the checkpoint named in their
    results. Evaluations of an earlier checkpoint of another size are excluded.
    """
    if out is None or not out.parent.is_dir():
        return [], []
    found, stale = [], 0
    beside: list[Place] = [*out.parent.iterdir()]
    for directory in sorted(beside, key=lambda each: each.name):
        if not _is_evaluation(directory):
            continue
        for facts in unit_facts(directory):
            model = facts.get("models", {}).get("model", {})
            is_named = directory.name == f"{out.name}.evaluation"
            is_ours = is_named or normpath(str(model.get("path"))) == normpath(str(out))
            if not model or not is_ours:
                continue
            if model.get("bytes") == out_bytes:
                found.append({**facts, "asked": _asked(directory, facts)})
            else:
                stale += 1
    remark = (
        f"{stale} evaluations beside the checkpoint are of another size of it; they are omitted."
    )
    found.sort(key=lambda facts: json.dumps(facts.get("text"), sort_keys=True))
    return found, [remark] if stale else []


def _asked(directory: Place, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which a text was read; empty if a later evaluation here was of another one."""
    asked, text = RunDirectory(directory).description().get("text"), facts.get("text", {})
    if not isinstance(asked, dict):
        return {}
    return asked if all(asked.get(n) == text.get(n) for n in ("source", "layout")) else {}


def _speed(out: Place | None) -> dict[str, Any]:
    """Read what `bench` has written beside a checkpoint."""
    if out is None or not (path := out.with_name(f"{out.name}{BENCH_SUFFIX}")).is_file():
        return {}
    found = parse_json(path.read_bytes())
    return found if isinstance(found, dict) else {}


def _is_evaluation(directory: Place) -> bool:
    """Return True for the run directory of an `evaluate`; False for a damaged one."""
    try:
        return "evaluate" in RunDirectory(directory).description()
    except InputError:
        return False


def told_events(run: Place) -> Iterator[dict[str, Any]]:
    """Yield notes, losses and workers; repeated events once, with their count."""
    told = [event for event in RunDirectory(run).events() if event.get("event") not in UNLISTED]
    for _, same in groupby(told, key=lambda event: {**event, "time": None}):
        repeated = list(same)
        yield {**repeated[0], "times": len(repeated)}


def _weight_bytes(directory: Place | None) -> int | None:
    """Size of a checkpoint's safetensors files, as counted by `evaluate`."""
    if directory is None or not directory.is_dir():
        return None
    weights = (file for file in directory.iterdir() if file.name.endswith(".safetensors"))
    return sum(map(size_of, weights)) or None
