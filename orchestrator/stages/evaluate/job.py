"""Passes of an evaluation, and its report: the driver's part."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.models.evaluation.scoring import Score
from orchestrator.runtime.calls import Call, Step
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.evaluate.values import KeyedEvaluation
from orchestrator.stages.evaluate.worker import tokens_per_second

Timings = dict[str, dict[range, list[float]]]
"""Seconds of sequences by model and shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Scores of all sequences, and the timings of those that this run has passed."""

    total: Score
    cut: Sequence[range]
    """Shards at the end of the pass."""
    prefill: Timings
    decode: Timings
    workers: int
    """The most workers at once."""
    made_elsewhere: Sequence[Mapping[str, Any]]
    memory: Mapping[str, Any] | None
    environment: Mapping[str, Any]


def earlier_report(keyed: KeyedEvaluation) -> dict[str, Any] | None:
    """The report of an earlier run of the same evaluation; None if there is none."""
    manifest = keyed.run.units.manifest(keyed.report_key)
    # earlier versions did not record the origin
    return None if manifest is None else {**manifest["facts"], **keyed.origin}


def measure(keyed: KeyedEvaluation, stage: RunningStage) -> Measurements:
    """Pass sequences through the shards of all models; the last shards give the scores."""
    workers, monitor = stage.workers, stage.monitor
    units, total = keyed.run.units, len(keyed.score_keys)
    keys = dict(enumerate(keyed.score_keys))
    left = reusable_units(units, keys, workers, monitor, stage=stage.name)
    elsewhere = monitor.made_elsewhere
    chunks = keyed.run.chunks(keyed.pass_key, workers.environment)
    cut, done = workers.cut(keyed.num_blocks), set(left)
    schedule = ShardPass(
        cut,
        todo=(),
        num_chunks=total,
        present=[chunks.present(blocks.start, total) for blocks in cut],
        results=set(done),
        joints=range(keyed.num_blocks),
    )
    timings: dict[str, Timings] = {"prefill": {}, "decode": {}}

    def on_success(call: Call, value: Any) -> None:
        if isinstance(call.command, Step):
            assert call.takes is not None
            assert call.emits is not None
            _note(timings, range(call.takes[0], call.emits[0]), value)
            if call.emits[0] == keyed.num_blocks:
                done.add(call.emits[1])
                stage.progress(len(done), total)

    run_pass(workers, monitor, schedule, chunks, on_success=on_success)
    score = Score()
    for index in range(total):
        facts = left.get(index) or units.facts(keys[index], workers.environment)
        assert facts is not None
        score = score.merge(Score.from_json(facts))
    usage = monitor.memory.get(stage.name)
    return Measurements(
        **timings,
        total=score,
        cut=schedule.cut,
        workers=monitor.most_workers,
        made_elsewhere=elsewhere,
        memory=usage.to_json() if usage else None,
        environment=workers.environment,
    )


def _note(timings: Mapping[str, Timings], shard: range, value: Mapping[str, Any]) -> None:
    """Add the seconds of one step to the timings of its shard."""
    for kind, by_model in timings.items():
        for name, seconds in value[kind].items():
            if seconds is not None:
                by_model.setdefault(name, defaultdict(list))[shard].append(seconds)


def commit_report(keyed: KeyedEvaluation, found: Measurements) -> dict[str, Any]:
    """All measurements; committed, so that the same evaluation is not repeated."""
    total = found.total
    losses = {"model": total.window_loss, "against": total.against_window_loss}
    length = keyed.token_report["sequence_length"]
    models = {
        name: {
            "path": str(path),
            "perplexity": math.exp(losses[name] / total.windows) if total.windows else None,
            "parameters": keyed.lazy_models[name].total_parameters,
            "bytes": keyed.lazy_models[name].weights.size_bytes,
            "prefill_tokens_per_second": _speed(found.prefill.get(name, {}), found.cut, length),
            "decode_tokens_per_second": _speed(found.decode.get(name, {}), found.cut, 1),
        }
        for name, path in keyed.models.items()
    }
    facts: dict[str, Any] = {
        "models": models,
        **keyed.origin,
        "text": keyed.token_report,
        "predictions": total.predictions,
        "shards": len(found.cut),
        "workers": found.workers,
        "environment": found.environment,
        **({"made_elsewhere": found.made_elsewhere} if found.made_elsewhere else {}),
        **({"memory": found.memory} if found.memory else {}),
    }
    if "against" in models and total.predictions:
        facts["kl"] = total.divergence / total.predictions
        facts["top1_agreement"] = total.agreements / total.predictions
    unit = keyed.run.units.begin(keyed.report_key)
    unit.commit(environment=found.environment, facts=facts)
    return facts


def _speed(seconds: Mapping[range, list[float]], cut: Sequence[range], tokens: int) -> float | None:
    """Tokens per second of the whole model; None if a shard has no timings."""
    by_shard = {shard: seconds.get(blocks, []) for shard, blocks in enumerate(cut)}
    return tokens_per_second(tokens, by_shard)
