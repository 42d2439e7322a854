"""Bytes that lie in the run directory at the worst moment of each stage, and what decides them.

A calibration with gradients passes back in as few segments as leave the run directory no larger
than `ROOM` times the model, or than it becomes later anyway; a training keeps states that it can be
taken up from unless that makes it larger than `TRAINING_ROOM` times the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.forecast import memory
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.memory import Footprint
from orchestrator.models.train_options import TrainOptions
from orchestrator.shards import cut_segments

ROOM = 2.5
"""Times the model's bytes that a run directory may take before chunks pass by segments."""
TRAINING_ROOM = 4.0
"""Times the model's bytes that it may take before a training keeps its values alone."""
SMALL_BYTES = 64e9
"""A run directory that is no larger is not made smaller at the cost of time."""
TOKEN_BYTES = 9
"""Beside a token's state: its id, in 8 bytes, and its place in the mask."""
TRAINED_BYTES = 4
"""Of a trained value: float32."""
STATE_BYTES: Mapping[str, int] = {"all": 12, "lean": 8, "light": 0}
"""Of a trained value in a snapshot: itself and its moments. Scales and norms count as none."""
MOST_SNAPSHOTS = 3
"""Of the training: the last one, the best, and the one that is being written."""


@dataclass(frozen=True)
class Storage:
    """Of one recipe and one model, cut into so many shards for so many workers."""

    costs: Costs
    workers: int
    shards: int

    @cached_property
    def stages(self) -> dict[str, Footprint]:
        """By stage, in the order of the run, what lies there at its worst moment."""
        return {"calibrate": self._calibrating(self.segments), **self._later}

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """Of the shards, for gradients to pass back: as few as need no more room than there is."""
        waves = -(-self.shards // self.workers) if self.costs.labels else 1
        cuts = [cut_segments(self.shards, self.workers, count) for count in range(1, waves + 1)]
        totals = [self._calibrating(cut).total for cut in cuts]
        later = max(each.total for each in self._later.values())
        room = max(ROOM * self._model, SMALL_BYTES, later, min(totals))
        return next(cut for cut, total in zip(cuts, totals, strict=True) if total <= room)

    @cached_property
    def _later(self) -> dict[str, Footprint]:
        """The stages behind calibration."""
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
                # spent block by block as the refined ones come
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
        """Whether a training can be taken up from its snapshots, or begins again after a loss."""
        return self.costs.recipe.train == "none" or "snapshots" in self._later["train"].parts

    def _snapshots(self, beside: float) -> dict[str, float]:
        """What training keeps beside what lies there: states, or values of the best if too large.

        The blocks that become of them are written while the last and the best are there.
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
        """Snapshots in the course of a training; its start is none."""
        options = self._training
        steps = options.epochs * min(options.batches, self.costs.sequences)
        return -(-steps // options.every)

    @property
    def _targets(self) -> float:
        """The dense model's top-k, value and id of each, and the rest in one."""
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
        """At the end of a shard, when its decompositions are there and its chunks still are too."""
        if not self.costs.labels:
            return _footprint({"decompositions": self._decompositions, "chunks": self._in_flight})
        moments = [
            self._back_through(shard, before + shard - segment.start)
            for before, segment in enumerate(segments)
            for shard in segment
        ]
        return max(moments, key=lambda each: each.total)

    def _back_through(self, shard: int, kept: int) -> Footprint:
        """When gradients have passed a shard, and chunks lie at so many boundaries.

        Gradients lie behind each shard that is held, and before the last of them.
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
        """Chunks of all sequences at one boundary: a state, an id and a mask a token."""
        tokens = self.costs.recipe.sequence_length
        return self.costs.sequences * (self.costs.state + TOKEN_BYTES * tokens)

    @property
    def _in_flight(self) -> float:
        """Chunks of a pass that keeps none: in front of each shard that is held, and behind all."""
        return min(self.shards - 1, self.workers + 1) * self._boundary

    @property
    def _kept(self) -> float:
        """Values of all cut linears."""
        return self.costs.recipe.share * sum(each.values for each in self.costs.shapes.linears)

    @cached_property
    def _decompositions(self) -> float:
        """Factors up to the largest rank that any plan can ask for, or all entries."""
        costs, linears = self.costs, self.costs.shapes.linears
        about = costs.needs, costs.is_pivoted, costs.out_itemsize
        return float(sum(memory.stored_bytes(each, *about) for each in linears))


def _footprint(parts: Mapping[str, float]) -> Footprint:
    return Footprint({name: int(count) for name, count in parts.items()})
