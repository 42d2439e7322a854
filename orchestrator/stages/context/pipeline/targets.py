"""Targets of a training: the next-token distributions of the dense model, one unit a sequence."""

from collections.abc import Sequence

from orchestrator.models.training.train_options import TrainOptions
from orchestrator.progress.tally import Ahead
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Keyed
from orchestrator.store.units import unit_key

TARGETS_VERSION = 1
"""Raised when the stored targets change."""


def target_keys(keyed: Keyed, options: TrainOptions) -> tuple[str, ...]:
    """Return the keys of the units of the dense model's top-k; they do not depend on the plan."""
    kept = {"top_k": options.top_k, "temperature": options.temperature}
    return tuple(
        unit_key("targets", TARGETS_VERSION, [keyed.pass_key], sequence=index, **kept)
        for index in range(keyed.sequences)
    )


def make_targets(
    keyed: Keyed, pass_key: str, keys: Sequence[str], stage: RunningStage, *, ahead: Ahead
) -> None:
    """Pass dense chunks through all shards, for the targets that do not exist yet.

    Args:
        pass_key: Key of the workers' pass.
        keys: Result of `target_keys`; nothing is done if it is empty.
        ahead: Work of the steps that follow.
    """
    workers, monitor = stage.workers, stage.monitor
    named = dict(enumerate(keys))
    results = set(
        reusable_units(
            keyed.run.units, named, workers, monitor, stage="targets", called="targets {}"
        )
    )
    if len(results) == len(keys):
        return
    cut = workers.cut(keyed.survey.num_blocks, group=keyed.grouping.size)
    chunks = keyed.run.chunks(pass_key, workers.environment)
    schedule = ShardPass(
        cut,
        todo=(),
        num_chunks=keyed.sequences,
        present=[chunks.present(blocks.start, keyed.sequences) for blocks in cut],
        results=results,
    )
    run_pass(workers, monitor, schedule, chunks, ahead=ahead)
