"""Bytes that lie in the run directory at the worst moment of each stage, and what decides them.

A calibration with gradients keeps as many boundaries' chunks as leave the run directory no larger
than `ROOM` times the model, or than it becomes later anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.forecast import memory
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.memory import Footprint
from orchestrator.shards import cut_segments

ROOM = 2.5
"""Times the model's bytes that a run directory may take before chunks pass by segments."""
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
        model = self.costs.shapes.total_values * self.costs.shapes.itemsize
        room = max(ROOM * model, SMALL_BYTES, later, min(totals))
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
            parts["refined blocks"] = trained
            stage("refine", chunks=self._in_flight)
        if recipe.refine == "swept":
            parts["swept blocks"] = trained
            stage("sweep", chunks=streams)
        if recipe.train != "none":
            stage("train", snapshots=MOST_SNAPSHOTS * STATE_BYTES[recipe.train] * self._kept)
            parts["trained blocks"] = trained
        stage("write")
        return found

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
        stored = costs.out_itemsize * sum(
            memory.stored_rank(each, costs.needs, costs.is_pivoted) * each.rank_cost
            for each in linears
        )
        if costs.needs.kind in ("rpca", "sparse", "two_sided_sparse"):
            stored += 8 * sum(each.values for each in linears)
        return float(stored)


def _footprint(parts: Mapping[str, float]) -> Footprint:
    return Footprint({name: int(count) for name, count in parts.items()})
