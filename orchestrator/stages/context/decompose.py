"""Calibration and decomposition: the driver's part, and the tasks of their workers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.forecast.outcome import Forecast
from orchestrator.forecast.room import MOST_BLOCKS
from orchestrator.forecast.statistics import decomposing_block
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.plan.experts import most_experts
from orchestrator.plan.linear import Linear
from orchestrator.runtime.deadline import slowly
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.block_pass import BlockPass
from orchestrator.stages.context.expert_group import WHOLE, ExpertGroup
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.values import Decomposed, Keyed, extended
from orchestrator.stages.context.worker.curvature_worker import BackwardSettings


def calibrate_and_decompose(
    keyed: Keyed,
    forecast: Forecast | None,
    stage: RunningStage,
) -> Decomposed:
    """Pass all chunks through the shards; each block is decomposed where its statistics are.

    Blocks that an earlier run has committed in this environment are not computed again. With
    several groups of experts the chunks pass once for each; see `ExpertGroup`.
    """
    passes = block_pass(keyed, forecast)
    patience = {"finish": _finish_seconds(keyed, stage.workers)}
    if keyed.method.gradient == "directions":
        # the first chunk of a shard computes the bases of all of its blocks
        shards = keyed.recipe.shards
        blocks = -(-keyed.survey.num_blocks // shards) if shards else passes.blocks
        patience["step"] = blocks * patience["finish"]
    passes = replace(passes, patience=patience)
    groups, keys = _expert_groups(keyed, forecast), keyed.block_keys
    committed = passes.committed(keys, stage) if len(groups) > 1 else None
    for group in groups[:-1]:
        there = group.keys(keys, keyed.linears, keyed.grouping)
        there = {block: key for block, key in there.items() if block not in (committed or {})}
        _gather(keyed, replace(passes, experts=group), there, stage)

    def drop_groups(block: int) -> None:
        """Remove the units of groups that the unit of a block contains now."""
        for group in groups[:-1]:
            keyed.run.units.drop(group.key(keys[block]))

    passes = replace(passes, experts=groups[-1], on_committed=drop_groups)
    facts = _gather(keyed, passes, keys, stage, committed=committed)
    return decomposed(keyed, forecast, facts)


def _gather(
    keyed: Keyed,
    passes: BlockPass,
    keys: Mapping[int, str],
    stage: RunningStage,
    *,
    committed: Mapping[int, dict[str, Any]] | None = None,
) -> dict[int, dict[str, Any]]:
    """Gather statistics in one pass, forward or also backward; gives the facts of its units."""
    if not keyed.needs_gradients:
        return passes.forward(keyed.pass_key, keys, stage, committed)
    return passes.backward(
        keyed.pass_key,
        keyed.statistics_key,
        draws=keyed.method.label_draws,
        keys=keys,
        stage=stage,
        committed=committed,
    )


def _expert_groups(keyed: Keyed, forecast: Forecast | None) -> list[ExpertGroup]:
    """The groups of experts, as the recipe or the forecast says; one without experts."""
    modules = frozenset(each.name for each in keyed.survey.experts)
    asked, most = keyed.recipe.expert_groups, most_experts(keyed.linears, modules)
    found = asked if isinstance(asked, int) else forecast.expert_groups if forecast else 1
    count = max(1, min(found, most))
    if count == 1 or not keyed.method.takes_experts_apart:
        return [WHOLE]
    return [ExpertGroup(place=place, count=count, modules=modules) for place in range(count)]


def decomposed(
    keyed: Keyed, forecast: Forecast | None, facts: Mapping[int, Mapping[str, Any]]
) -> Decomposed:
    """The next value, from the facts of the units of decompositions."""
    results = {
        result["curve"]["name"]: result for each in facts.values() for result in each["linears"]
    }
    return extended(keyed, Decomposed, forecast=forecast, facts=facts, results=results)


def block_pass(keyed: Keyed, forecast: Forecast | None) -> BlockPass:
    """The passes of chunks through the blocks of the model."""
    return BlockPass(
        run=keyed.run,
        num_blocks=keyed.survey.num_blocks,
        sequences=keyed.sequences,
        group=keyed.grouping.size,
        blocks=forecast.blocks_that_fit if forecast else MOST_BLOCKS,
        segments=forecast.segments if forecast else 1,
    )


def _finish_seconds(keyed: Keyed, workers: WorkerGroup) -> float:
    """Seconds that the decomposition of a group of blocks may take on a slow machine.

    Groups are equal in most models; some have experts in later blocks only.
    """
    groups: dict[int, list[Linear]] = {}
    for linear in keyed.linears:
        groups.setdefault(keyed.grouping.first(linear.block), []).append(linear)
    work = decomposing_block(
        max(groups.values(), key=lambda each: sum(linear.values for linear in each)),
        keyed.method,
        pivoted=keyed.is_pivoted,
        itemsize=keyed.codec.itemsize,
    )
    return slowly(work.flops, workers.environment["device"])


def compression_task(keyed: Keyed, *, pass_key: str = "", settings: Any = None) -> CompressionTask:
    """Make the task of the workers of a stage.

    Args:
        pass_key: Key of the pass whose chunks they read and write; empty: that of the calibration.
        settings: Settings of the stage; see `CompressionTask.settings`.
    """
    return CompressionTask(
        run_dir=keyed.run.root,
        threads=keyed.recipe.threads_per_worker,
        pass_key=pass_key or keyed.pass_key,
        fingerprints={keyed.model: keyed.survey.fingerprint},
        writes=(keyed.run.root, keyed.out),
        model=keyed.model,
        out=keyed.out,
        method=keyed.method,
        dtype=keyed.dtype,
        output_dtype=parse_dtype(keyed.recipe.output_dtype),
        linears=keyed.linears,
        form=keyed.form,
        grouping=keyed.grouping,
        tokens_key=keyed.tokens_key,
        block_keys=keyed.block_keys,
        block_cosines=keyed.block_cosines,
        order_keys=keyed.orders,
        gain_keys=keyed.gains,
        settings=settings,
    )


def calibration_task(keyed: Keyed) -> CompressionTask:
    """Make the task of the workers that calibrate, with backward passes if gradients are needed."""
    if not keyed.needs_gradients:
        return compression_task(keyed)
    backward = BackwardSettings(
        gradients_key=keyed.statistics_key,
        sequences=keyed.sequences,
        randomness=keyed.randomness,
    )
    return compression_task(keyed, settings=backward)
