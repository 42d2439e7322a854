"""Worker of the learning: a shard of the dense model whose linears have gates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.training.gate_scores import (
    GatePull,
    GateScores,
    GateTraining,
    final_scores,
    gate_pulls,
)
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.plan.linear import Linear
from orchestrator.runtime.calls import Command
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.pipeline.commands import PassCommand
from orchestrator.stages.context.pipeline.shard import (
    FILE,
    OpenTraining,
    PipelineShard,
    snapshot_key,
)
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.open_shard import DenseModel
from orchestrator.stages.context.worker.orders import order_by_score, write_scores
from orchestrator.stages.context.worker.stored import Decompositions


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnSettings:
    """Settings of the learning of scores."""

    options: TrainOptions
    penalty_by: str
    keys: Mapping[int, str]
    """Keys of the units of scores, by block."""
    target_keys: tuple[str, ...]


class LearnWorker(Worker):
    """Learns scores on a shard of the dense model, whose targeted linears have gates.

    Weights and factors stay in the dtype of the passes; scores and gradients of gates are float32.
    """

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.settings: LearnSettings = task.settings
        self.dense = DenseModel(task, self.run, self.device)
        self._decompositions = Decompositions(task, self.run, self.device)
        self.pipeline = PipelineShard(self, task, self.dense, self._gated_shard)

    def perform(self, command: Command, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a command; a pass of the pipeline takes its input chunk and emits its own."""
        if isinstance(command, PassCommand):
            return self.pipeline.perform(command, record)
        return super().perform(command, record)

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Load a dense shard, for the targets."""
        self.pipeline.open(range(*blocks))

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the dense weights of later blocks into the system's cache."""
        self.dense.lazy.read_ahead(blocks)

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass a dense chunk on; after the last block its top-k is committed."""
        return self.pipeline.step(index, emit, record)

    def next_inputs(self, index: int) -> list[Stored]:
        return self.pipeline.next_inputs(index)

    def take(self, blocks: tuple[int, int], step: int) -> dict[str, Any]:
        """Open a shard at the snapshot after a step; at step 0 all gates are open."""
        return self.pipeline.take(range(*blocks), step)

    def _gated_shard(self, blocks: range) -> OpenTraining[GateTraining]:
        task = self.task
        pulls = gate_pulls(list(task.linears), task.form, self.settings.penalty_by)
        model = self.dense.lazy.shard(blocks)
        try:
            model.freeze()
            gates: dict[int, dict[str, GateScores]] = {block: {} for block in blocks}
            for linear in task.linears:
                if linear.block in blocks and linear.name in pulls:
                    scores = self._gate(model, linear, pulls[linear.name])
                    gates[linear.block][linear.name] = scores
        except BaseException:
            model.close()
            raise
        return OpenTraining(model, GateTraining(gates))

    def _gate(self, model: Shard, linear: Linear, pull: GatePull) -> GateScores:
        """Give a linear of an open shard gates for its stored directions."""
        module, count = model.module(linear.name), len(pull.tail) - 1
        weight_OI = dense_weight(module)
        left_OR, right_RI = (
            self._decompositions.factor(linear, part, count).to(weight_OI)
            for part in ("weight", "down")
        )
        bias = getattr(module, "bias", None)
        bias_O = bias if isinstance(bias, Tensor | nn.Parameter) else None
        gated = GatedLowRankLinear(left_OR, right_RI, weight_OI, bias_O)
        model.run_as(module, gated.__call__)
        return GateScores(gated, pull)

    def update(self, step: int, rate: float, penalty: float) -> None:
        """Make one step of all scores of the shard."""
        self.pipeline.work.training.update(step, rate, penalty)

    def snapshot(self, step: int) -> dict[str, Any]:
        """Commit the state of every block. Returns the counts of open gates by linear."""
        self.pipeline.snapshot(step)
        return {"counts": self.pipeline.work.training.counts()}

    def commit(self, block: int, step: int, facts: dict[str, Any]) -> None:
        """Commit the scores of a block after the last step."""
        path = self.run.units.file(snapshot_key(self.task.pass_key, step, block), FILE)
        found = final_scores(load_file(path), step)
        unit = self.run.units.begin(self.settings.keys[block])
        write_scores(unit, {name: order_by_score(each.numpy()) for name, each in found.items()})
        unit.commit(environment=self.environment(), facts=facts)
