"""Peak size of the run directory in each stage, and the choices that limit it.

A calibration with gradients goes back in the fewest segments with which the run directory is no
larger than `ROOM` times the model, or than it becomes later anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.forecast.costs import Costs
from orchestrator.forecast.memory import SETTLED_BYTES, Footprint
from orchestrator.forecast.stage_cost import Parts, Setting, StageCost
from orchestrator.forecast.statistics import method_statistics
from orchestrator.plan.cut import cut_segments
from orchestrator.stage_names import CALIBRATE

ROOM = 2.5
"""Size of a run directory, in model sizes, above which chunks pass by segments."""
SMALL_BYTES = 64e9
"""Size up to which a run directory is not made smaller at the cost of time."""
TRAINED_BYTES = 4
"""Bytes of a trained value: float32."""


@dataclass(frozen=True)
class Storage:
    """Peak sizes in a setting."""

    setting: Setting
    later: Mapping[str, StageCost]
    """Costs of the stages after calibration, by name, in order."""

    @cached_property
    def stages(self) -> dict[str, Footprint]:
        """Peak content of the run directory by stage, in the order of the run."""
        return {CALIBRATE: self._calibrating(self.segments), **self._later}

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """Segments of shards for the backward pass: the fewest that fit into the room."""
        waves = -(-self.setting.shards // self.setting.workers) if self._costs.label_draws else 1
        cuts = [
            cut_segments(self.setting.shards, self.setting.workers, count)
            for count in range(1, waves + 1)
        ]
        totals = [self._calibrating(cut).total for cut in cuts]
        later = max(each.total for each in self._later.values())
        room = max(ROOM * self._costs.model_bytes, SMALL_BYTES, later, min(totals))
        return next(cut for cut, total in zip(cuts, totals, strict=True) if total <= room)

    @cached_property
    def _later(self) -> dict[str, Footprint]:
        """Peak content in the stages after calibration."""
        parts: Parts = {"decompositions": self._decompositions}
        found = dict[str, Footprint]()
        for name, cost in self.later.items():
            most, parts = cost.content(parts)
            found[name] = _footprint(most)
        return found

    @property
    def keeps_states(self) -> bool:
        """True if all stages resume from their content; else one begins again after a loss."""
        return all(cost.keeps_states(self._later[name]) for name, cost in self.later.items())

    @property
    def _costs(self) -> Costs:
        return self.setting.costs

    def _calibrating(self, segments: Sequence[range]) -> Footprint:
        """Content at the end of a shard, with its decompositions and still with its chunks."""
        if not self._costs.label_draws:
            parts = {"decompositions": self._decompositions, "chunks": self.setting.in_flight}
            return _footprint(parts | self._group_units)
        moments = [
            self._back_through(shard, before + shard - segment.start)
            for before, segment in enumerate(segments)
            for shard in segment
        ]
        return max(moments, key=lambda each: each.total)

    def _back_through(self, shard: int, kept: int) -> Footprint:
        """Content when gradients have passed a shard, with chunks at `kept` boundaries.

        Gradients are stored after each open shard, and before the last of them.
        """
        done = self.setting.shards - shard
        flowing = min(self.setting.workers + (done > 1), shard + (done > 1))
        # with groups of experts, earlier passes have left their part of all blocks
        made = self.setting.shards if self.setting.groups > 1 else done
        return _footprint(
            {
                "decompositions": self._decompositions * made / self.setting.shards,
                **self._group_units,
                "chunks": kept * self._costs.boundary,
                "gradients": flowing * self._costs.label_draws * self._costs.boundary,
            }
        )

    @cached_property
    def _group_units(self) -> dict[str, float]:
        """Content of the units of expert groups beside decompositions; empty for one group.

        For each block the sums over all experts, and the statistics of experts with fewer tokens
        than channels if all have equally many; once the results of a block, which are copied.
        """
        groups, costs, shapes = self.setting.groups, self._costs, self.setting.shapes
        if groups == 1:
            return {}
        statistics = method_statistics(shapes.heaviest, costs.method)
        tokens = costs.tokens * costs.sequences * shapes.routed
        given = [statistics.of(each) for each in shapes.heaviest if shapes.is_expert(each.name)]
        sizes = [each.gram for each in given] + [each.curvature for each in given]
        rare = sum(n * n for n in sizes if tokens < n) * (groups - 1) / groups
        pools = sum(n * n for n in statistics.pools(shapes).values()) * (groups - 1)
        copies = self._decompositions / shapes.num_blocks
        return {"expert groups": SETTLED_BYTES * shapes.num_blocks * (rare + pools) + copies}

    @cached_property
    def _decompositions(self) -> float:
        """Bytes of factors up to the largest rank of any plan, or of all entries."""
        costs = self._costs
        of_kind = costs.method.kind.cost
        about: dict[str, Any] = {"pivoted": costs.is_pivoted, "itemsize": costs.out_itemsize}
        return float(sum(of_kind.stored_bytes(each, **about) for each in costs.shapes.linears))


def _footprint(parts: Mapping[str, float]) -> Footprint:
    return Footprint({name: int(count) for name, count in parts.items()})
