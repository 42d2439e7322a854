"""Tasks of lm-evaluation-harness, each on all models in turn, with whole models in this process.

On a CPU they use the threads of torch, by default one per core: `threads` of a recipe is about
workers, of which there may be one per core.
"""

import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.errors import InputError, OrchestratorError
from orchestrator.harness.installed import check_installed
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.survey.architecture import brief
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.stages.evaluate.values import SurveyedEvaluation
from orchestrator.store.files import digest_json
from orchestrator.store.places import Remote
from orchestrator.store.units import unit_key
from orchestrator.version import __version__

TASKS_VERSION = 1
PROGRESS_SECONDS = 5.0
"""Minimum time between events about the requests of one task."""
IDENTIFYING = ("task", "metric", "filter")


class TaskEvaluation:
    """Evaluation of one or two models on tasks; a score is a unit by model and task.

    Construction checks that the tasks exist.

    Raises:
        UsageError: A task is unknown, or lm-evaluation-harness is not installed.
        InputError: A model is not on local disk.
    """

    def __init__(self, surveyed: SurveyedEvaluation) -> None:
        check_installed()
        from orchestrator.harness.tasks import TaskSet

        assert surveyed.tasks is not None
        for place in surveyed.models.values():
            if isinstance(place, Remote):
                raise InputError(
                    f"{place}: tasks need whole models on local disk; download the model"
                )
        self._surveyed, self._units = surveyed, surveyed.run.units
        self._set = TaskSet(surveyed.tasks)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: dict[str, Any] = {}

    def perform(self, stage: StageMonitor, monitor: RunMonitor) -> dict[str, Any]:
        """Evaluate every task on the dense and the compressed model in turn.

        Returns:
            `models` (path, parameters, bytes), `tasks` (rows as `compared`), and the environment;
            committed as a unit.

        Raises:
            InputError: A task fails; those before it are kept.
        """
        # the dense model first, as in tables
        names = [name for name in ("against", "model") if name in self._surveyed.models]
        count, rows, keys = 0, [], []
        options = self._set.options
        for task_name in options.names:
            with _one_line(task_name):
                task = self._set.read(task_name)
                identity = digest_json(task.identity())
            by_model: dict[str, list[dict[str, Any]]] = {}
            for name in names:
                begun = time.monotonic()
                key = self._key(name, identity)
                keys.append(key)
                by_model[name] = self._scored(task, name, key, monitor)
                count += 1
                stage.progress(
                    count,
                    len(names) * len(options.names),
                    unit=f"{task_name} of {self._surveyed.models[name].name}",
                    seconds=time.monotonic() - begun,
                )
            rows += compared(by_model)
        return self._commit(rows, keys)

    def _key(self, name: str, identity: str) -> str:
        lazy_model = self._surveyed.lazy_models[name]
        inputs, dtype = [lazy_model.weights.fingerprint, identity], str(lazy_model.dtype)
        return unit_key("task", TASKS_VERSION, inputs, dtype=dtype)

    def _scored(self, task: Any, name: str, key: str, monitor: RunMonitor) -> list[dict[str, Any]]:
        """Rows of a task for one model: those of an earlier run, or new ones."""
        facts = self._units.facts(key, self.environment())
        if facts is None:
            with _one_line(task.name):
                model = self._model(name)
                model.on_pass = _reporter(task.name, monitor)
                facts = {"rows": task.rows(model)}
            unit = self._units.begin(key)
            unit.commit(environment=self.environment(), facts=facts)
        rows: list[dict[str, Any]] = facts["rows"]
        return rows

    def _model(self, name: str) -> Any:
        """The model as the harness calls it; loaded at its first use, and kept."""
        from orchestrator.harness.model import HarnessModel
        from orchestrator.harness.tasks import quiet
        from orchestrator.hf import load

        if name not in self._loaded:
            place, dtype = self._surveyed.models[name], self._surveyed.lazy_models[name].dtype
            with quiet():
                model = load(str(place), dtype=dtype).to(self._device)
                self._loaded[name] = HarnessModel(model, load_tokenizer(place))
        return self._loaded[name]

    def environment(self) -> dict[str, Any]:
        """Properties of the machine and its software that can change a score."""
        is_gpu = self._device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if is_gpu else "cpu",
            "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in ("transformers", "lm_eval")},
            "orchestrator": __version__,
        }

    def _commit(self, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
        surveyed = self._surveyed
        models = {
            name: {
                "path": str(path),
                "parameters": surveyed.lazy_models[name].total_parameters,
                "bytes": surveyed.lazy_models[name].weights.size_bytes,
            }
            for name, path in surveyed.models.items()
        }
        facts = {
            "models": models,
            **surveyed.origin,
            "tasks": [*map(dict, rows)],
            "environment": self.environment(),
        }
        unit = surveyed.run.units.begin(unit_key("tasks", TASKS_VERSION, keys))
        unit.commit(environment=self.environment(), facts=facts)
        return facts


def compared(by_model: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of models to rows with `value` and `stderr` by model, and the retention.

    Retention: the compressed value over the dense one, both above `chance` if the task states it.
    None if lower values are better, or the dense model is not above chance.
    """
    found = {
        name: {tuple(row[each] for each in IDENTIFYING): row for row in rows}
        for name, rows in by_model.items()
    }
    joined = []
    for row in by_model["model"]:
        key = tuple(row[each] for each in IDENTIFYING)
        values = {name: rows[key] for name, rows in found.items() if key in rows}
        common = {n: v for n, v in row.items() if n not in ("value", "stderr")}
        scores = {n: {"value": r["value"], "stderr": r["stderr"]} for n, r in values.items()}
        chance = row.get("chance", 0.0)
        dense = values["against"]["value"] - chance if "against" in values else 0.0
        is_known = row["higher_is_better"] is True and dense > 0
        retention = (row["value"] - chance) / dense if is_known else None
        joined.append({**common, **scores, "retention": retention})
    return joined


def _reporter(task: str, monitor: RunMonitor) -> Any:
    """Function of finished and all requests of a task that sends events."""
    begun = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PROGRESS_SECONDS or not done:
            monitor.event({"event": "polled"})
            return
        last = now
        monitor.event(
            {
                "event": "progress",
                "stage": "tasks",
                "done": done,
                "total": total,
                "of": f"requests of {task}",
                "left": (now - begun) / done * (total - done),
            }
        )

    return report


@contextmanager
def _one_line(task: str) -> Iterator[None]:
    """Convert errors of foreign code into InputError with the name of the task."""
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:  # whatever the harness makes of a task file and its documents
        raise InputError(
            f"task {task}: {brief(error)}; try it with `orchestrator lm-eval`"
        ) from error
