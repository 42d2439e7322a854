"""One evaluation: the driver's part."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.errors import InputError
from orchestrator.models.evaluation.scoring import Score
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.locate import locate
from orchestrator.recipe.execution import Execution
from orchestrator.runtime.calls import Call, Step
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.tokens import commit_tokens
from orchestrator.stages.evaluate.worker import EvaluationTask, tokens_per_second
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

EVALUATE_VERSION = 1


class Evaluation:
    """One or two models on one text."""

    def __init__(
        self,
        models: Mapping[str, str],
        *,
        text: Mapping[str, Any],
        dtype: torch.dtype | None,
        execution: Execution,
        run_dir: Place,
    ) -> None:
        self.models = {name: locate(model).absolute() for name, model in models.items()}
        self.text = text
        self.execution = execution
        self.run = RunDirectory(run_dir.expanduser().absolute())
        self.run.check()
        self.description: Mapping[str, Any] = {"evaluate": dict(models), "text": dict(text)}
        self._dtype = dtype
        self._prefill: dict[str, dict[range, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._decode: dict[str, dict[range, list[float]]] = defaultdict(lambda: defaultdict(list))

    def survey(self) -> None:
        """Blocks and sizes of every model; no weight is read.

        Raises:
            InputError: The models do not have the same blocks and vocabulary.
        """
        self.skeletons = {
            name: LazyModel.open(path, dtype=self._dtype) for name, path in self.models.items()
        }
        self.fingerprints = {
            self.models[name]: lazy_model.weights.fingerprint
            for name, lazy_model in self.skeletons.items()
        }
        ours = self.skeletons["model"]
        self.num_blocks = ours.num_blocks
        for name, lazy_model in self.skeletons.items():
            found = lazy_model.num_blocks, lazy_model.config.get_text_config().vocab_size
            wanted = ours.num_blocks, ours.config.get_text_config().vocab_size
            if found != wanted:
                raise InputError(
                    f"{self.models[name]}: {found[0]} blocks and {found[1]} tokens in the "
                    f"vocabulary; {self.models['model']} has {wanted[0]} and {wanted[1]}, and only "
                    "models of one shape are compared token by token"
                )

    def read_text(self) -> None:
        """Text to token sequences, by the first model's tokenizer."""
        tokens = load_tokens(**self.text, tokenizer=load_tokenizer(self.models["model"]))
        vocabulary = self.skeletons["model"].config.get_text_config().vocab_size
        tokens.check_within(vocabulary, self.models["model"])
        self.token_report = tokens.report
        self.tokens_key = commit_tokens(self.run, tokens)
        inputs = [*self.fingerprints.values(), self.tokens_key]
        dtypes = {name: str(lazy_model.dtype) for name, lazy_model in self.skeletons.items()}
        self.pass_key = unit_key("evaluate", EVALUATE_VERSION, inputs, dtypes=dtypes)
        self.slice_keys = tuple(
            unit_key("score", EVALUATE_VERSION, [self.pass_key], sequence=index)
            for index in range(tokens.report["sequences"])
        )

    @property
    def task(self) -> EvaluationTask:
        return EvaluationTask(
            run_dir=self.run.root,
            threads=self.execution.threads_per_worker,
            pass_key=self.pass_key,
            fingerprints=self.fingerprints,
            writes=(self.run.root,),
            models=self.models,
            dtype=self._dtype,
            tokens_key=self.tokens_key,
            slice_keys=self.slice_keys,
        )

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier run of the same evaluation."""
        manifest = self.run.units.manifest(self._result_key)
        return None if manifest is None else manifest["facts"]

    @property
    def _result_key(self) -> str:
        return unit_key("evaluation", EVALUATE_VERSION, [self.pass_key])

    def score(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Pass sequences through the shards of all models; the last shards give the scores."""
        units, total = self.run.units, len(self.slice_keys)
        keys = dict(enumerate(self.slice_keys))
        left = reusable_units(units, keys, workers, monitor, stage=stage.name)
        self._elsewhere = monitor.made_elsewhere
        chunks = self.run.chunks(self.pass_key, workers.environment)
        cut = workers.cut(self.num_blocks)
        done = set(left)
        schedule = ShardPass(
            cut,
            todo=(),
            num_chunks=total,
            present=[chunks.present(blocks.start, total) for blocks in cut],
            results=set(done),
            joints=range(self.num_blocks),
        )

        def on_success(call: Call, value: Any) -> None:
            if isinstance(call.command, Step):
                assert call.takes is not None
                assert call.emits is not None
                self._note_timings(range(call.takes[0], call.emits[0]), value)
                if call.emits[0] == self.num_blocks:
                    done.add(call.emits[1])
                    stage.progress(len(done), total)

        run_pass(workers, monitor, schedule, chunks, on_success=on_success)
        self._workers = monitor.most_workers
        self._usage = monitor.memory.get(stage.name)
        self.total = Score()
        for index in range(total):
            facts = left.get(index) or units.facts(keys[index], workers.environment)
            assert facts is not None
            self.total = self.total.merge(Score.from_json(facts))
        self._cut = schedule.cut

    def _note_timings(self, shard: range, timings: Mapping[str, Any]) -> None:
        for name, seconds in timings["prefill"].items():
            self._prefill[name][shard].append(seconds)
        for name, seconds in timings["decode"].items():
            if seconds is not None:
                self._decode[name][shard].append(seconds)

    def report(self, workers: WorkerGroup) -> dict[str, Any]:
        """All measurements; committed, so that the same evaluation is not repeated."""
        total = self.total
        losses = {"model": total.window_loss, "against": total.against_window_loss}
        models = {
            name: {
                "path": str(path),
                "perplexity": math.exp(losses[name] / total.windows) if total.windows else None,
                "parameters": self.skeletons[name].total_parameters,
                "bytes": self.skeletons[name].weights.size_bytes,
                "prefill_tokens_per_second": self._speed(self._prefill[name], prefill=True),
                "decode_tokens_per_second": self._speed(self._decode[name], prefill=False),
            }
            for name, path in self.models.items()
        }
        report: dict[str, Any] = {
            "models": models,
            "text": self.token_report,
            "predictions": total.predictions,
            "shards": len(self._cut),
            "workers": self._workers,
            "environment": workers.environment,
            **({"made_elsewhere": self._elsewhere} if self._elsewhere else {}),
            **({"memory": self._usage.to_json()} if self._usage else {}),
        }
        if "against" in models and total.predictions:
            report["kl"] = total.divergence / total.predictions
            report["top1_agreement"] = total.agreements / total.predictions
        unit = self.run.units.begin(self._result_key)
        unit.commit(environment=workers.environment, facts=report)
        return report

    def _speed(self, seconds: Mapping[range, list[float]], *, prefill: bool) -> float | None:
        tokens = self.token_report["sequence_length"] if prefill else 1
        by_shard = {shard: seconds.get(blocks, []) for shard, blocks in enumerate(self._cut)}
        return tokens_per_second(tokens, by_shard)
