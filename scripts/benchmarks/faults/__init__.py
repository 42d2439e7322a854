"""Repeated runs with injected faults: effect of each fault, and proof that no byte changed.

Each trial is a separate run on a cluster of nodes on this machine, with a few faults at moments
chosen by its seed: a stage and a number of finished units. The faults are real: processes are
killed, stopped and starved of memory, nodes killed and drained, drivers killed and stopped, whole
clusters replaced, files damaged. If no node would remain, another one is started. The same command
is repeated until it is done, for every exit code. Each trial is a file: existing trials are not
repeated.

A unit counts as redone for each report of its end beyond the first; for training, the steps since
the last snapshot count. Recovery is the time from a fault to the next finished unit after the loss
was noticed, or the driver restarted; faults without a loss have none.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common import synthetic
from benchmarks.common.figures import print_table, say
from benchmarks.common.nodes import Cluster
from benchmarks.faults.course import Fault, FaultHistory
from benchmarks.faults.injections import KINDS, Scene
from benchmarks.methods import once

from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import ResolvedRecipe, resolve
from orchestrator.runtime.deadline import VARIABLE as DEADLINE
from orchestrator.store.files import digest_file, digest_json

RECIPES: Mapping[str, Mapping[str, str]] = {
    "best": {"preset": "best"},
    "cap": {"method": "cap"},
    "walk": {"method": "svd-llm", "refine": "in_order", "compensate": "anchored"},
}
"""Recipes that together have every stage, with few epochs of training."""
SHORT = {"refinement.epochs": 3, "training.epochs": 2, "training.every": 2}
SMALL = ["--samples", "8", "--sequence-length", "48", "--keep", "0.6", "--max-shard-size", "150KB"]
LIVES = 8
"""Maximum number of drivers of one run."""
NODES = 2
RECOVERY_SECONDS = 30.0
"""Maximum recovery time after a killed node, with Ray's default health checks."""


@cache
def resolved(recipe: str) -> ResolvedRecipe:
    """Resolve one of `RECIPES`."""
    return resolve(make_recipe({"model": "m", "out": "o", "keep": 0.6} | RECIPES[recipe]))


@dataclass(frozen=True, slots=True)
class Trial:
    """One run, with its faults."""

    seed: int
    recipe: str
    faults: tuple[Fault, ...]

    @classmethod
    def drawn(cls, seed: int, count: int) -> "Trial":
        """Draw kinds in turn over the trials, so that few trials cover all of them; the rest at
        random."""
        rng = random.Random(seed)
        recipe = rng.choice(list(RECIPES))
        kinds = list(KINDS)
        faults = [
            Fault(
                kinds[(seed * count + n) % len(kinds)],
                rng.choice(resolved(recipe).stage_names),
                rng.choice([0.0, 0.2, 0.4, 0.6, 0.8]),
            )
            for n in range(count)
        ]
        return cls(seed, recipe, tuple(faults))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/faults"))
    parser.add_argument("--trials", metavar="N", type=int, default=4)
    parser.add_argument("--faults", metavar="N", type=int, default=3, help="of each trial")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the first trial")
    parser.add_argument("--soak", action="store_true", help="enough trials for 201 faults")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a real one; a tiny one without")
    parser.add_argument("--calibration", metavar="TEXT", type=Path, help="for the real one")


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    trials = math.ceil(201 / options.faults) if options.soak else options.trials
    drawn = [Trial.drawn(options.seed + n, options.faults) for n in range(trials)]
    subject = _Subject(options)
    results = []
    with Cluster(NODES) as cluster:
        for trial in drawn:
            path = options.work / f"{subject.name}-{trial.seed}-{options.faults}.json"
            results.append(once(path, lambda t=trial: perform(t, cluster, subject)))
    show(results)
    return {"trials": results}


class _Subject:
    """Compressed model with its text, and the result of an undisturbed run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._work = options.work
        if options.model is None:
            self.name, self.model, self.text = "tiny", self._work / "dense", self._work / "text.txt"
            if not self.model.exists():
                config = synthetic.config_of(blocks=8, hidden=128, intermediate=256)
                synthetic.write_model(self.model, config)
                synthetic.write_text(self.text, 4000)
        else:
            self.name, self.model, self.text = "real", options.model, options.calibration

    def out(self, trial: Trial) -> Path:
        path: Path = self._work / f"{self.name}-{trial.seed}"
        return path

    def arguments(self, recipe: str, out: Path) -> list[str]:
        options = [f"--option={name}={value}" for name, value in SHORT.items()]
        known = [each for each in options if each[9:].split(".")[0] in _used_tables(recipe)]
        flags = [f"--{name}={value}" for name, value in RECIPES[recipe].items()]
        flags += [*known, *SMALL, f"--calibration={self.text}"]
        return ["compress", str(self.model), str(out), *flags, "--progress", "json"]

    def reference(self, recipe: str) -> dict[str, str]:
        """Hashes of the files that an undisturbed run in one process writes."""
        out = self._work / f"{self.name}-{recipe}"
        if not (out / "config.json").exists():
            command = [*self.arguments(recipe, out), "--executor", "local"]
            subprocess.run(_command(command), check=True, stderr=subprocess.DEVNULL)
        return hashes(out)


def _used_tables(recipe: str) -> set[str]:
    """Tables of options that the stages of a recipe take."""
    return {table for stage in resolved(recipe).stages for table in stage.used_tables}


def perform(trial: Trial, cluster: Cluster, subject: _Subject) -> dict[str, Any]:
    """Perform one run to its end, with all faults."""
    say(f"trial {trial.seed}: {trial.recipe}, {', '.join(each.kind for each in trial.faults)}")
    expected, out = subject.reference(trial.recipe), subject.out(trial)
    for left in (out, Path(f"{out}.run")):
        shutil.rmtree(left, ignore_errors=True)
    cluster.nodes.fill(NODES)
    course, scene, codes = (
        FaultHistory(trial.faults),
        Scene(cluster, out, random.Random(trial.seed)),
        [],
    )
    while course.life < LIVES and codes[-1:] != [0]:
        _live(subject.arguments(trial.recipe, out), course, scene)
        assert scene.driver is not None
        codes.append(scene.driver.wait())
        course.life += 1
        cluster.nodes.fill(1)
    return {
        "recipe": trial.recipe,
        "faults": course.happened,
        "missed": [asdict(fault) for fault in course.waiting],
        "codes": codes,
        "identical": codes[-1:] == [0] and hashes(out) == expected,
        "left": cluster.left_behind(),
        "seconds": course.seconds,
    }


def _live(arguments: Sequence[str], course: FaultHistory, scene: Scene) -> None:
    """Run one driver to its end, with its faults."""
    scene.driver = subprocess.Popen(
        _command([*arguments, "--address", scene.cluster.nodes.address]),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | scene.variables | {DEADLINE: "20", "OMP_NUM_THREADS": "1"},
    )
    scene.workers, scene.variables = [], {}
    for event in _events(scene.driver):
        if event["event"] == "workers":
            scene.workers += event["workers"]
        course.note(event)
        # faults before the start of workers or after the end of a driver have no effect
        is_there = scene.workers and scene.driver.poll() is None
        if is_there and (fault := course.due(event)) is not None:
            # the target of a fault may not exist at this moment
            with suppress(LookupError):
                KINDS[fault.kind](scene)
                course.met(fault)


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *arguments]


def _events(driver: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert driver.stderr is not None
    for line in driver.stderr:
        if line.startswith("{"):
            yield json.loads(line)


def hashes(out: Path) -> dict[str, str]:
    """Hash every file of a checkpoint, without the parts of the report that may differ."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name == "orchestrator_report.json":
            report = json.loads(path.read_text())
            report.pop("timings")
            found[path.name] = digest_json(report)
        elif path.is_file():
            found[str(path.relative_to(out))] = digest_file(path)
    return found


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each kind of fault in each stage, then the totals."""
    rows = [("fault", "stage", "times", "identical", "redone", "at most", "recovery", "at most")]
    met: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in results:
        for fault in each["faults"]:
            about = fault | {"identical": each["identical"]}
            met.setdefault((fault["kind"], fault["stage"]), []).append(about)
    for (kind, stage), faults in sorted(
        met.items(), key=lambda item: list(KINDS).index(item[0][0])
    ):
        redone = [fault["redone"] for fault in faults]
        identical = sum(fault["identical"] for fault in faults)
        cells = [len(faults), identical, sum(redone), max(redone)]
        rows.append((kind, stage, *map(str, cells), *_recovery(faults)))
    print_table(rows)
    faults = [fault for each in met.values() for fault in each]
    differ = sum(not each["identical"] for each in results)
    left = sum(bool(each["left"]) for each in results)
    print(
        f"{len(faults)} faults in {len(results)} runs: {differ} results lost or different, "
        f"{sum(fault['redone'] for fault in faults)} units redone, {left} runs left something"
    )
    killed = [fault for (kind, _), each in met.items() for fault in each if kind == "node killed"]
    median, most = _recovery(killed)
    print(f"after a killed node: {median}, at most {most}; {RECOVERY_SECONDS:.0f} s are allowed")


def _recovery(faults: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the median and the maximum recovery; empty for faults without a loss."""
    seconds = [fault["recovered"] for fault in faults if "recovered" in fault]
    if not seconds:
        return "", ""
    return f"{statistics.median(seconds):.1f} s", f"{max(seconds):.1f} s"
