"""Worker of the learning: a shard of the dense model whose linears have gates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.allocate.gates.base import GateKind
from orchestrator.linalg.extend import extend_directions
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.training.adapted import AdaptedScores, Adapter, adapter_rows
from orchestrator.models.training.gate_scores import (
    GateScores,
    GateTraining,
    LearnedGates,
    final_scores,
    gate_pulls,
    num_directions,
    with_tail,
)
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.models.training.path_gates import (
    PathGates,
    PathTask,
    path_gains,
    path_scores,
)
from orchestrator.models.training.polarised import (
    DirectionGains,
    PolarisedGates,
    final_gates,
    gate_fractions,
    scores_and_gains,
)
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.plan.linear import Linear
from orchestrator.randomness import Randomness
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
from orchestrator.stages.context.worker.orders import (
    DirectionScores,
    order_by_score,
    with_adapters,
    write_adapters,
    write_gains,
    write_scores,
)
from orchestrator.stages.context.worker.stored import Decompositions
from orchestrator.store.units import unit_key

GAINS_VERSION = 1
"""Raised when the content of such a unit changes."""
MakeGates = Callable[[Linear, GatedLowRankLinear], LearnedGates]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnSettings:
    """Settings of the learning of scores."""

    options: TrainOptions
    penalty_by: str
    randomness: Randomness
    gates: GateKind
    keys: Mapping[int, str]
    """Keys of the units of scores, by block."""
    target_keys: tuple[str, ...]
    tail: str = "gate"
    """"gate" or "full"; see `allocate.gates.learned.Learned`."""
    adapters: int = 0
    """Rank of the adapters; 0: none."""
    path: PathTask | None = None
    """Curves and settings of a path of thresholds; None: gates have other steps."""
    ranks: Mapping[str, int] | None = None
    """Ranks of the linears that a plan cuts, whose gains are learned; None: scores are."""


def snapshot_gains_key(key: str, step: int, block: int) -> str:
    """Return the key of the gains of a block at a snapshot of the learning of this key."""
    return unit_key("gains at a snapshot", GAINS_VERSION, [key], step=step, block=block)


class LearnWorker(Worker):
    """Learns scores on a shard of the dense model, whose targeted linears have gates, or gains on
    one of the model that a plan cuts.

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
        found = self.pipeline.take(range(*blocks), step)
        return {**found, "sizes": self.pipeline.work.training.sizes()}

    def _gated_shard(self, blocks: range) -> OpenTraining[GateTraining]:
        task = self.task
        gated = [each for each in task.linears if self._num_gated(each)]
        make = self._maker(gated)
        model = self.dense.lazy.shard(blocks)
        try:
            model.freeze()
            gates: dict[int, dict[str, LearnedGates]] = {block: {} for block in blocks}
            for linear in gated:
                if linear.block in blocks:
                    gates[linear.block][linear.name] = make(linear, self._gate(model, linear))
        except BaseException:
            model.close()
            raise
        return OpenTraining(model, GateTraining(gates))

    def _num_gated(self, linear: Linear) -> int:
        """Directions of a linear that have a gate."""
        if self.settings.ranks is not None:
            return self.settings.ranks.get(linear.name, 0)
        return num_directions(linear, self.task.form, self.settings.adapters)

    def _maker(self, linears: list[Linear]) -> MakeGates:
        """Return the constructor of the gates of linears."""
        match self.settings.gates:
            case "gains":
                return self._gains
            case "thresholds":
                assert self.settings.path is not None
                return partial(self._on_path, self.settings.path)
            case "polarised":
                return self._polarised(linears)
            case "pulled":
                return self._pulled(linears)

    def _on_path(self, path: PathTask, linear: Linear, gated: GatedLowRankLinear) -> LearnedGates:
        """Make the gates of a linear that thresholds close."""
        return PathGates(gated, path.curves[linear.name], path.settings)

    def _gains(self, linear: Linear, gated: GatedLowRankLinear) -> LearnedGates:
        """Make the gains of a linear, which begin at its gates."""
        gates_K = self._decompositions.gains(linear)
        assert gates_K is not None  # polarised gates are stored with the scores
        return DirectionGains(gated, gates_K[: self._num_gated(linear)])

    def _pulled(self, linears: list[Linear]) -> MakeGates:
        """Return the constructor of the scores of linears, with adapters if there are some."""
        settings = self.settings
        pulls = gate_pulls(linears, self.task.form, settings.penalty_by, settings.adapters)

        def make(linear: Linear, gated: GatedLowRankLinear) -> LearnedGates:
            pull = pulls[linear.name]
            if not settings.adapters:
                return GateScores(gated, pull)
            size = linear.out_features, linear.in_features, settings.adapters
            draw = settings.randomness.adapter(linear.name)
            gated.adapter = adapter = Adapter(size, draw, self.device)
            return AdaptedScores(gated, pull, adapter)

        return make

    def _polarised(self, linears: list[Linear]) -> MakeGates:
        """Return the constructor of the polarised gates of linears."""
        form, total = self.task.form, sum(each.values for each in linears)

        def make(linear: Linear, gated: GatedLowRankLinear) -> LearnedGates:
            count = num_directions(linear, form)
            return PolarisedGates(gated, gate_fractions(linear, form, count, total))

        return make

    def _gate(self, model: Shard, linear: Linear) -> GatedLowRankLinear:
        """Give a linear of an open shard gates for its directions, and its tail if it has one."""
        module, count = model.module(linear.name), self._num_gated(linear)
        weight_OI = dense_weight(module)
        left_OR, right_RI = (
            self._decompositions.factor(linear, part, count).to(weight_OI)
            for part in ("weight", "down")
        )
        bias = getattr(module, "bias", None)
        bias_O = bias if isinstance(bias, Tensor | nn.Parameter) else None
        if self.settings.tail == "full":
            gated = GatedLowRankLinear(
                *extend_directions(weight_OI, left_OR, right_RI), bias_O=bias_O
            )
        else:
            tail_OI = weight_OI if self.settings.ranks is None else None
            gated = GatedLowRankLinear(left_OR, right_RI, tail_OI, bias_O)
        model.run_as(module, gated.__call__)
        return gated

    def update(self, step: int, rate: float, penalty: float, polarisation: float) -> dict[str, Any]:
        """Make one step of all gates of the shard. Returns the parts of the kept fraction."""
        training = self.pipeline.work.training
        training.update(step, rate, penalty, polarisation)
        return {"sizes": training.sizes() if self.settings.gates == "polarised" else {}}

    def snapshot(self, step: int) -> dict[str, Any]:
        """Commit the state of every block. Returns the counts of open gates by linear, or none of
        gains."""
        self.pipeline.snapshot(step)
        path, training = self.settings.path, self.pipeline.work.training
        if path is not None and path.settings.gains:
            for block in training.blocks:
                unit = self.run.units.begin(snapshot_gains_key(self.task.pass_key, step, block))
                found = path_gains(training.state(block))
                write_gains(unit, {name: each.numpy() for name, each in found.items()})
                unit.commit(environment=self.environment(), facts={})
        counts = self.settings.ranks is None
        return {"counts": self.pipeline.work.training.counts() if counts else {}}

    def commit(self, block: int, step: int, facts: dict[str, Any]) -> None:
        """Commit the scores, or the gains, of a block after the last step."""
        path = self.run.units.file(snapshot_key(self.task.pass_key, step, block), FILE)
        state = load_file(path)
        unit = self.run.units.begin(self.settings.keys[block])
        if self.settings.ranks is not None:
            write_gains(unit, {name: each.numpy() for name, each in final_gates(state).items()})
        else:
            write_scores(unit, self._ordered(state, step))
            if self.settings.adapters:
                write_adapters(unit, adapter_rows(state))
        unit.commit(environment=self.environment(), facts=facts)

    def _ordered(self, state: Mapping[str, Tensor], step: int) -> dict[str, DirectionScores]:
        """Return the scores of a block's linears after the last step, with gains if they are
        polarised."""
        ended: dict[str, tuple[Tensor, ...]]
        if self.settings.gates == "polarised":
            ended = {name: scores_and_gains(each) for name, each in final_gates(state).items()}
        elif self.settings.path is not None:
            ended = {name: (each,) for name, each in path_scores(state).items()}
        else:
            ended = {name: (self._final(name, s),) for name, s in final_scores(state, step).items()}
        return {
            name: with_adapters(
                order_by_score(*(tensor.numpy() for tensor in each)), self.settings.adapters
            )
            for name, each in ended.items()
        }

    def _final(self, name: str, scores_N: Tensor) -> Tensor:
        """Return the scores of the directions of a linear that may be stored, and of its tail."""
        if self.settings.tail == "gate":
            return scores_N
        return with_tail(scores_N, self._num_gated(self.task.linear(name)))
