"""Base of stages that train the compressed model: unit keys, and fields of their workers' task."""

from collections.abc import Sequence
from typing import Any

from orchestrator.stages.context.decompose import task_fields
from orchestrator.stages.context.stage_job import StageJob
from orchestrator.stages.context.values import Planned
from orchestrator.store.units import unit_key


class TrainedStage(StageJob):
    """A stage that leaves a unit of trained tensors for each block that it changes.

    Args:
        earlier: The jobs before it; the model is as the last of them leaves it.
        version: Raised when a trained tensor changes.
        decisive: Settings that decide the tensors, beside plan, seed and earlier stages.
    """

    def __init__(
        self, planned: Planned, earlier: Sequence[StageJob], *, version: int, **decisive: Any
    ) -> None:
        self._planned = planned
        trained = [each for each in earlier if each.trained_units is not None]
        self._earlier = tuple(each.trained_units or {} for each in trained)
        before = [each.key for each in trained]
        inputs = [planned.pass_key, *planned.block_keys.values(), *planned.choice, *before]
        self.key = unit_key(
            self.name,
            version,
            inputs,
            plan=planned.plan.to_json(),
            seed=planned.randomness.seed,
            **decisive,
        )
        self.keys = {
            block: unit_key(f"{self.name} block", version, [self.key], block=block)
            for block in self.blocks
        }
        self.trained_units = self.keys

    @property
    def blocks(self) -> list[int]:
        """The blocks that are trained: those with a linear that is cut."""
        forms = {name: each.form for name, each in self._planned.plan.assignments.items()}
        return sorted({each.block for each in self._planned.linears if forms[each.name] != "dense"})

    @property
    def shared(self) -> dict[str, Any]:
        """Fields that the tasks of all such stages have."""
        planned = self._planned
        return task_fields(planned) | {
            "pass_key": self.key,
            "plan": planned.plan,
            "randomness": planned.randomness,
            "choice": "".join(planned.choice),
            "earlier": self._earlier,
            "keys": self.keys,
        }
