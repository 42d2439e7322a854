"""Units of trained tensors that a stage makes of the compressed model, and their keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.plan import Plan
from orchestrator.randomness import Randomness
from orchestrator.stages.context.stage_job import StageJob
from orchestrator.stages.context.values import Planned
from orchestrator.store.units import unit_key


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedUnits:
    """The compressed model before a stage, and the units of trained tensors that the stage makes.

    A part of the settings of the stage's workers.
    """

    key: str
    """Common input of the keys of the units."""
    keys: Mapping[int, str]
    """Keys of the units, by block."""
    earlier: tuple[Mapping[int, str], ...]
    """Keys of the units of earlier stages, by block; of two that have a tensor, the last one has
    the present values."""
    plan: Plan
    randomness: Randomness
    choice: str
    """Unit of the kept candidates, if the allocation chooses one by one; otherwise ""."""


def trained_units(
    planned: Planned,
    earlier: Sequence[StageJob],
    *,
    name: str,
    version: int,
    blocks: Sequence[int],
    **decisive: Any,
) -> TrainedUnits:
    """Assign the keys of a stage's units.

    Args:
        earlier: The jobs before it; the model is as the last of them leaves it.
        name: Name of the stage.
        version: Raised when a trained tensor changes.
        blocks: The blocks that get a unit.
        decisive: Settings that decide the tensors, beside plan, seed and earlier stages.
    """
    trained = [each for each in earlier if each.trained_units is not None]
    before = [each.key for each in trained]
    inputs = [planned.pass_key, *planned.block_keys.values(), *planned.chosen_by, *before]
    plan, randomness = planned.plan, planned.randomness
    key = unit_key(name, version, inputs, plan=plan.to_json(), seed=randomness.seed, **decisive)
    return TrainedUnits(
        key=key,
        keys={block: unit_key(f"{name} block", version, [key], block=block) for block in blocks},
        earlier=tuple(each.trained_units or {} for each in trained),
        plan=plan,
        randomness=randomness,
        choice="".join(planned.choice),
    )


def changed_blocks(planned: Planned) -> list[int]:
    """Indices of the blocks with a linear that is not dense."""
    forms = {name: each.form for name, each in planned.plan.assignments.items()}
    return sorted({each.block for each in planned.linears if forms[each.name] != "dense"})
