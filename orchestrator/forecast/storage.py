"""Peak size of the run directory in each stage, and the choices that limit it.

A calibration with gradients goes back in the fewest segments with which the run directory is no
larger than `ROOM` times the model, or than it becomes later anyway. A training keeps states to
resume from unless that makes it larger than `TRAINING_ROOM` times the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.forecast import memory
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.memory import Footprint
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.plan.cut import cut_segments

ROOM = 2.5
"""Size of a run directory, in model sizes, above which chunks pass by segments."""
TRAINING_ROOM = 4.0
"""Size, in model sizes, above which a training keeps values without states."""
SMALL_BYTES = 64e9
"""Size up to which a run directory is not made smaller at the cost of time."""
TOKEN_BYTES = 9
"""Bytes of a token beside its state: an id of 8 bytes, and a mask entry."""
TRAINED_BYTES = 4
"""Bytes of a trained value: float32."""
STATE_BYTES: Mapping[str, int] = {"all": 12, "lean": 8, "light": 0}
"""Bytes of a trained value in a snapshot, with its moments. Scales and norms are left out."""
MOST_SNAPSHOTS = 3
"""Snapshots of a training: the last one, the best, and the one that is being written."""


@dataclass(frozen=True)
class Storage:
    """Peak sizes for one recipe and one model, with numbers of workers and shards."""

    costs: Costs
    workers: int
    shards: int

    @cached_property
    def stages(self) -> dict[str, Footprint]:
        """Peak content of the run directory by stage, in the order of the run."""
        return {"calibrate": self._calibrating(self.segments), **self._later}

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """Segments of shards for the backward pass: the fewest that fit into the room."""
        waves = -(-self.shards // self.workers) if self.costs.labels else 1
        cuts = [cut_segments(self.shards, self.workers, count) for count in range(1, waves + 1)]
        totals = [self._calibrating(cut).total for cut in cuts]
        later = max(each.total for each in self._later.values())
        room = max(ROOM * self._model, SMALL_BYTES, later, min(totals))
        return next(cut for cut, total in zip(cuts, totals, strict=True) if total <= room)

    @cached_property
    def _later(self) -> dict[str, Footprint]:
        """Peak content in the stages after calibration."""
        recipe, found = self.costs.recipe, dict[str, Footprint]()
        parts = {"decompositions": self._decompositions}

        def stage(name: str, **more: float) -> None:
            held = {part: int(count) for part, count in {**parts, **more}.items()}
            found[name] = Footprint(held)

        factors = self.costs.out_itemsize * self._kept
        trained = TRAINED_BYTES * self._kept
        streams = 2 * (1 + 4 / self.costs.itemsize) * self._boundary
        if self.costs.needs.scores:
            stage("score", chunks=self._in_flight)
        if self.costs.needs.refits(recipe.share):
            parts["fitted factors"] = factors
            stage("refit", chunks=self._in_flight)
        if self.costs.is_pivoted:
            parts["pivoted factors"] = factors
            stage("pivot")
        if recipe.compensate != "none" or recipe.refine == "in_order":
            parts["walked blocks"] = trained
            stage("walk", chunks=streams)
        if recipe.refine in ("blocks", "swept"):
            if "walked blocks" not in parts:
                # spent block by block as refined ones are committed
                parts.pop("pivoted factors", None)
            parts["refined blocks"] = trained
            stage("refine", chunks=self._in_flight)
        if recipe.refine == "swept":
            parts["swept blocks"] = trained
            stage("sweep", chunks=streams)
        if recipe.train != "none":
            parts["targets"] = self._targets
            stage("train", **self._snapshots(sum(parts.values())))
            parts["trained blocks"] = self.costs.out_itemsize * self._kept
        stage("write")
        return found

    @cached_property
    def keeps_states(self) -> bool:
        """True if a training resumes from snapshots; else it begins again after a loss."""
        return self.costs.recipe.train == "none" or "snapshots" in self._later["train"].parts

    def _snapshots(self, beside: float) -> dict[str, float]:
        """Content that training adds: states, or the best values if states are too large.

        Trained blocks are written while the last and the best snapshot exist.

        Args:
            beside: Bytes of the other content.
        """
        written = self.costs.out_itemsize * self._kept
        state = STATE_BYTES[self.costs.recipe.train] * self._kept
        count = min(self._snapshots_made, MOST_SNAPSHOTS)
        states = max(count * state, min(count, 2) * state + written)
        if beside + states <= max(TRAINING_ROOM * self._model, SMALL_BYTES):
            return {"snapshots": states}
        return {"best values": written}

    @property
    def _snapshots_made(self) -> int:
        """Number of snapshots in a training; the start is not one."""
        options = self._training
        steps = options.epochs * min(options.batches, self.costs.sequences)
        return -(-steps // options.every)

    @property
    def _targets(self) -> float:
        """Bytes of the targets: values and ids of the dense model's top-k, and one for the rest."""
        recipe, options = self.costs.recipe, self._training
        if options.targets != "stored":
            return 0.0
        outcomes = min(options.top_k, self.costs.shapes.vocabulary)
        return float(recipe.samples * recipe.sequence_length * (8 * outcomes + 4))

    @property
    def _training(self) -> TrainOptions:
        return TrainOptions(**self.costs.recipe.options.get("training", {}))

    @property
    def _model(self) -> int:
        """Bytes of the dense model."""
        return self.costs.shapes.total_values * self.costs.shapes.itemsize

    def _calibrating(self, segments: Sequence[range]) -> Footprint:
        """Content at the end of a shard, with its decompositions and still with its chunks."""
        if not self.costs.labels:
            return _footprint({"decompositions": self._decompositions, "chunks": self._in_flight})
        moments = [
            self._back_through(shard, before + shard - segment.start)
            for before, segment in enumerate(segments)
            for shard in segment
        ]
        return max(moments, key=lambda each: each.total)

    def _back_through(self, shard: int, kept: int) -> Footprint:
        """Content when gradients have passed a shard, with chunks at `kept` boundaries.

        Gradients are stored behind each open shard, and before the last of them.
        """
        done = self.shards - shard
        flowing = min(self.workers + (done > 1), shard + (done > 1))
        return _footprint(
            {
                "decompositions": self._decompositions * done / self.shards,
                "chunks": kept * self._boundary,
                "gradients": flowing * self.costs.labels * self._boundary,
            }
        )

    @property
    def _boundary(self) -> float:
        """Bytes at one boundary of all sequences: a state, an id and a mask entry a token."""
        tokens = self.costs.recipe.sequence_length
        return self.costs.sequences * (self.costs.state + TOKEN_BYTES * tokens)

    @property
    def _in_flight(self) -> float:
        """Bytes of a pass that keeps no chunks: those before each open shard, and behind all."""
        return min(self.shards - 1, self.workers + 1) * self._boundary

    @property
    def _kept(self) -> float:
        """Number of values that are kept of all linears."""
        return self.costs.recipe.share * sum(each.values for each in self.costs.shapes.linears)

    @cached_property
    def _decompositions(self) -> float:
        """Bytes of factors up to the largest rank of any plan, or of all entries."""
        costs, linears = self.costs, self.costs.shapes.linears
        about = costs.needs, costs.is_pivoted, costs.out_itemsize
        return float(sum(memory.stored_bytes(each, *about) for each in linears))


def _footprint(parts: Mapping[str, float]) -> Footprint:
    return Footprint({name: int(count) for name, count in parts.items()})
