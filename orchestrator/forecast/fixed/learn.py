"""Cost of learning gates: steps of a pipeline over the dense model with factors beside it."""

from collections.abc import Mapping

from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.forecast import memory
from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.stage_cost import Parts, StageCost
from orchestrator.forecast.work import Work, computed
from orchestrator.methods.kinds.costs.extended import extending, extending_bytes
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.plan.linear import Linear
from orchestrator.stage_names import LEARN

GATE_BYTES = 24
"""Bytes of a gate that is learned: score, two moments, step in which it closed, gate, gradient."""
GATE_STATE_BYTES = 16
"""Bytes of a gate in a snapshot; the last one and the one that is being written exist."""
PATH_GATE_BYTES, PATH_STATE_BYTES = 60, 20
"""The same of a gate of a path: gain, its two means, gate, gradient; worth, place and curve."""
ADAPTER_BYTES = 16
"""Bytes of a value of an adapter: itself, two moments, gradient."""
ADAPTER_STATE_BYTES = 12
"""Bytes of a value of an adapter in a snapshot."""


class LearnCost(StageCost):
    """Steps of a pipeline over the dense model with factors beside its weights.

    A sequence of a step passes forward twice and back to the inputs once, with two products, of the
    weight and of the factors, each time, or with those of the factors of all directions if all have
    gates; directions that are not stored are then made as a shard opens. There are no gradients of
    weights. Held-out sequences pass forward at each snapshot and, for a divergence, all sequences
    of the text through the dense model. The number of steps is an estimate, see
    `Allocator.scoring_passes`, which counts products of weights alone.
    """

    def forecast(self, held: Footprint) -> StageForecast:
        setting, workers = self.setting, self.setting.workers
        head = setting.costs.head().times(1 / 3)
        gated, dense = self._pass().times(self._blocks) + head, setting.costs.forward(self._blocks)
        opening = self._opening.times(self._blocks)
        work = gated.times(self._passes + self._evaluations)
        if self._allocator.divergence:
            work += (dense + head).times(setting.sequences)
        micro = self._allocator.batch
        filling = (micro + workers - 1) / micro
        return StageForecast(
            name=LEARN,
            flops=(opening + work).flops,
            seconds=setting.seconds(
                lambda rates: (opening.seconds(rates) + filling * work.seconds(rates)) / workers
            ),
            device=self._memory(min(workers, self._blocks)),
        )

    def shares(self) -> Mapping[str, Work]:
        """A sequence passes a block; the last shard has the head beside its blocks."""
        setting, costs = self.setting, self.setting.costs
        forward, (held, state) = self._pass(), self._gate_bytes
        blocks = -(-self._blocks // min(setting.workers, self._blocks))
        head = Work(single=costs.head().flops / blocks)
        return {
            "open": costs.load(1) + self._opening,
            "take": costs.load(1).times(2),
            "forward": forward,
            "score": costs.forward(1) + head.times(1 / 3),
            "backward": forward.times(2),
            "turn": forward.times(3) + head,
            "evaluate": forward + head.times(1 / 3),
            "update": Work(read=held * self._gates + ADAPTER_BYTES * self._adapter_values),
            "snapshot": Work(
                write=state * self._gates + ADAPTER_STATE_BYTES * self._adapter_values
            ),
            "commit": Work(write=8 * self._gates + 4 * self._adapter_values),
        }

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        """Targets of a divergence and two snapshots, then the scores, float32, and the orders,
        int32, with the gains of polarised gates, and those of each budget or snapshot."""
        gates, allocator = self._gates * self._blocks, self._allocator
        of_gates = 4 if allocator.gates == "polarised" else 0
        of_budgets = 4 * len(allocator.gain_budgets)
        if allocator.snapshot_gains:
            of_budgets += 4 * -(-allocator.expected_steps // allocator.every)
        held = {**before, "targets": self._targets} if self._targets else before
        adapters = self._adapter_values * self._blocks
        after = {**held, "scores": (8 + of_gates + of_budgets) * gates + 4 * adapters}
        peak = (8 + of_budgets + 2 * self._gate_bytes[1]) * gates
        peak += (4 + 2 * ADAPTER_STATE_BYTES) * adapters
        return {**held, "scores": peak}, after

    @property
    def _evaluations(self) -> float:
        """Passes of held-out sequences, at the start and at every snapshot."""
        allocator = self._allocator
        held_out = max(round(allocator.held_out * self.setting.sequences), 1)
        return float(held_out * (1 + -(-allocator.expected_steps // allocator.every)))

    @property
    def _targets(self) -> float:
        """Bytes of the dense model's top-k for all sequences, if the loss has a divergence."""
        setting = self.setting
        if not self._allocator.divergence:
            return 0.0
        outcomes = min(TrainOptions().top_k, setting.shapes.vocabulary)
        return float(setting.sequences * setting.tokens * (8 * outcomes + 4))

    def remedy(self) -> str:
        """The fewest workers with which it fits."""
        counts = range(self.setting.workers, self._blocks + 1)
        fits = (n for n in counts if self.setting.room.fits(self._memory(n)))
        if (workers := next(fits, None)) is not None:
            return f"what fits: {workers} workers"
        return "--allocation threshold needs no learning"

    @property
    def _blocks(self) -> int:
        return self.setting.shapes.num_blocks

    @property
    def _passes(self) -> float:
        return self.setting.costs.allocator.scoring_passes(len(self.setting.shapes.linears))

    @property
    def _allocator(self) -> GateAllocator:
        allocator = self.setting.costs.allocator
        assert isinstance(allocator, GateAllocator)  # checked by `make_allocator`
        return allocator

    @property
    def _is_full(self) -> bool:
        """True if all directions have gates, in place of a tail."""
        return self._allocator.tail == "full"

    @property
    def _ranks(self) -> list[tuple[Linear, int]]:
        """Linears of a block, with the number of their directions that have gates."""
        heaviest = self.setting.shapes.heaviest
        if self._is_full:
            return [(each, min(each.out_features, each.in_features)) for each in heaviest]
        form = self.setting.costs.budget.form
        return [(each, form.break_even(each) - 1 - self._adapters) for each in heaviest]

    @property
    def _extended(self) -> list[tuple[Linear, int]]:
        """Linears of a block whose directions are completed as it opens, with the number of the
        stored ones; empty unless all directions have gates."""
        if not self._is_full:
            return []
        costs = self.setting.costs
        stored, pivoted = costs.method.kind.cost.stored_rank, costs.is_pivoted
        return [(each, stored(each, pivoted=pivoted)) for each in self.setting.shapes.heaviest]

    @property
    def _opening(self) -> Work:
        """Decompositions for the directions of a block that are not stored."""
        return sum((extending(*each) for each in self._extended), Work())

    @property
    def _adapters(self) -> int:
        """Rank of the adapters."""
        return self._allocator.adapters

    @property
    def _adapter_values(self) -> float:
        """Values of the adapters of a block."""
        return float(sum(self._adapters * linear.rank_cost for linear, _ in self._ranks))

    @property
    def _gate_bytes(self) -> tuple[int, int]:
        """Bytes of a gate on the device, and in a snapshot."""
        if self._allocator.gates == "thresholds":
            return PATH_GATE_BYTES, PATH_STATE_BYTES
        return GATE_BYTES, GATE_STATE_BYTES

    @property
    def _gates(self) -> float:
        """Gates of a block."""
        return float(sum(rank + (not self._is_full) for _, rank in self._ranks))

    @property
    def _factor_values(self) -> float:
        """Values of the factors of a block."""
        return float(sum(rank * linear.rank_cost for linear, rank in self._ranks))

    def _pass(self) -> Work:
        """Products of a sequence with a block and its factors, in one direction."""
        setting = self.setting
        routed = 1 - setting.shapes.idle_values / setting.shapes.block_values
        weights = sum(each.values for each, _ in self._ranks) if self._is_full else 0
        # a fourth product, that of an adapter's gradient, on top of the three of a step
        values = self._factor_values - weights + 4 / 3 * self._adapter_values
        factors = 2.0 * setting.tokens * values * routed
        return setting.costs.forward(1) + computed(factors, setting.costs.itemsize)

    def _memory(self, workers: int) -> Footprint:
        """Footprint of one worker's shard, if `workers` hold the whole model between them: of its
        steps, or of the last block that opens where more is held then."""
        setting, shapes = self.setting, self.setting.shapes
        size, tokens, blocks = setting.costs.itemsize, setting.tokens, -(-self._blocks // workers)
        inner = sum(rank + linear.in_features for linear, rank in self._ranks)
        logits = 4 * 4 * tokens * shapes.vocabulary
        between = size * tokens * shapes.hidden * (blocks + 2 * workers)
        adapters = int(ADAPTER_BYTES * blocks * self._adapter_values)
        held = {
            "process": memory.PROCESS_BYTES,
            "weights": blocks * shapes.block_values * size,
            "factors": int(blocks * self._factor_values) * size,
            "gates": int(self._gate_bytes[0] * blocks * self._gates),
            **({"adapters": adapters} if adapters else {}),
            "embeddings or head": size * max(shapes.front_values, shapes.head_values),
        }
        activations = memory.activation_bytes(shapes, tokens, size, 1) + size * tokens * inner
        activations += logits + between
        opening = (extending_bytes(*each, size) for each in self._extended)
        if (decomposition := max(opening, default=0)) > activations:
            return Footprint({**held, "decomposition": decomposition})
        return Footprint({**held, "activations": activations})
