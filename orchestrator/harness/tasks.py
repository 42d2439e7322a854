"""Tasks of lm-evaluation-harness by name: their definition, documents and results."""

import difflib
import importlib.metadata
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.tasks import TaskManager

from orchestrator.errors import UsageError
from orchestrator.harness.options import TaskOptions

SEED = 0
"""Seed of few-shot examples, and of every generator that a task uses."""
BOOTSTRAPS = 1000
"""Resamplings for the standard error of a metric that is not a mean."""


class TaskSet:
    """Tasks that exist; each is read when it is asked for.

    Raises:
        UsageError: A name is unknown, or the directory does not exist.
    """

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        self._manager = _manager(options)

    def read(self, name: str) -> "HarnessTask":
        """Read a task, or a group of tasks, with its documents.

        Raises:
            Exception: Any, from the harness, the task file or the reader of its documents.
        """
        with quiet():
            return HarnessTask(name, self._manager.load([name]), self.options)


class HarnessTask:
    """One task, or the tasks of a group or a tag."""

    def __init__(self, name: str, loaded: Mapping[str, Any], options: TaskOptions) -> None:
        self.name = name
        self._loaded, self._options = loaded, options
        self._tasks: Mapping[str, Any] = loaded["tasks"]
        for task in self._tasks.values():
            stated = task.get_config("num_fewshot")
            # a task that states 0 has no examples to give
            shots = stated if stated == 0 or options.shots is None else options.shots
            task.set_config(key="num_fewshot", value=shots or 0)

    def identity(self) -> dict[str, Any]:
        """Everything that determines a result besides the model: definition and documents."""
        limit = self._options.limit
        tasks = {
            name: {
                "definition": json.loads(json.dumps(task.dump_config(), default=str)),
                "documents": _plain(itertools.islice(task.eval_docs, limit)),
                "examples": _plain(task.fewshot_docs()) if task.get_config("num_fewshot") else [],
            }
            for name, task in self._tasks.items()
        }
        version = importlib.metadata.version("lm_eval")
        return {"tasks": tasks, "limit": limit, "seed": SEED, "lm_eval": version}

    def rows(self, model: Any) -> list[dict[str, Any]]:
        """Evaluate a model of the harness: one row by task and metric.

        A group that has aggregated metrics gives their rows instead of those of its tasks.

        Returns:
            `task`, `metric`, `filter`, `value`, `stderr` (None if unknown), `higher_is_better`,
            `documents`, `shots`, and `chance`, if the task states it: the value of guessing, in its
            `metadata`, as a number or by metric.
        """
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for task in self._tasks.values():
            task.set_fewshot_seed(seed=SEED)
        with quiet():
            found = evaluate(
                model,
                task_dict=self._loaded,
                limit=self._options.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        groups = found.get("groups", {})
        names = [self.name] if self.name in groups else [*self._tasks]
        results = {**found["results"], **groups}
        return [row for name in names for row in self._rows(name, results[name], found)]

    def _rows(
        self, name: str, metrics: Mapping[str, Any], found: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        counts = found.get("n-samples", {})
        for label, value in metrics.items():
            metric, comma, kind = label.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = found.get("higher_is_better", {}).get(name, {}).get(metric)
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            row = {
                "task": name,
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                "higher_is_better": better,
                "documents": counts.get(name, {}).get("effective"),
                "shots": found.get("n-shot", {}).get(name),
            }
            chance = _chance(self._tasks.get(name), metric)
            yield row if chance is None or better is False else {**row, "chance": chance}


def _manager(options: TaskOptions) -> TaskManager:
    """Find the tasks in the directory of the user, and only if one is not there, which takes many
    seconds, in those of the harness."""
    directory = None if options.directory is None else Path(options.directory)
    if directory is not None and not directory.is_dir():
        raise UsageError(f"task_dir: {directory} is not a directory; give one with task files")
    own: list[str] = []
    if directory is not None:
        manager = TaskManager(include_path=str(directory), include_defaults=False)
        own = manager.all_tasks
        if set(options.names) <= set(own):
            return manager
    place = None if directory is None else str(directory)
    manager = TaskManager(include_path=place)
    for name in options.names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3) or own[:3]
            hint = f"; similar ones: {', '.join(near)}" if near else ""
            there = "" if directory is None else f", and no file of that name in {directory}"
            raise UsageError(f"tasks: {name} is not a task of lm-evaluation-harness{there}{hint}")
    return manager


def _plain(documents: Any) -> list[Any]:
    """Documents as JSON."""
    listed: list[Any] = json.loads(json.dumps([*documents], default=str))
    return listed


def _chance(task: Any, metric: str) -> float | None:
    """Value of guessing that the task file states for a metric; None if it states none."""
    said = (task.get_config("metadata") or {}).get("chance") if task is not None else None
    if isinstance(said, Mapping):
        said = said.get(metric)
    return float(said) if isinstance(said, int | float) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Drop bars and lines that the harness and transformers print inside the context."""
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        yield
