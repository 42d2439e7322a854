"""Cost of the training of the whole compressed model."""

from collections.abc import Mapping

from orchestrator.forecast.memory import (
    PROCESS_BYTES,
    Footprint,
    activation_bytes,
    trained_block,
)
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Parts, Setting, StageCost
from orchestrator.forecast.storage import SMALL_BYTES
from orchestrator.forecast.work import Work, kept_values, trained
from orchestrator.models.training.train_options import TrainOptions

TRAINED_BYTES: Mapping[str, int] = {"all": 16, "lean": 12, "light": 4}
"""Bytes of a parameter of the trained model. `light` holds it alone; scales are left out."""
STATE_BYTES: Mapping[str, int] = {"all": 12, "lean": 8, "light": 0}
"""Bytes of a trained value in a snapshot, with its moments. Scales and norms are left out."""
BACKWARD: Mapping[str, int] = {"all": 2, "lean": 2, "light": 1}
"""Cost of a backward pass in forward passes, its recomputation left out; `light` needs gradients
of inputs alone."""
MOST_SNAPSHOTS = 3
"""Snapshots of a training: the last one, the best, and the one that is being written."""
TRAINING_ROOM = 4.0
"""Size of a run directory, in model sizes, above which snapshots are values without states."""
BEST_VALUES = "best values"
"""Part of the content of a training that keeps no states."""


class TrainCost(StageCost):
    """The whole model as a pipeline over the workers; recomputation adds a pass forward."""

    def __init__(self, setting: Setting, options: TrainOptions, mode: str) -> None:
        super().__init__(setting)
        self._options, self._mode = options, mode

    def forecast(self, held: Footprint) -> StageForecast:
        setting, options, workers = self.setting, self._options, self.setting.workers
        shapes, costs, blocks = setting.shapes, setting.costs, setting.shapes.num_blocks
        passes = 2 + BACKWARD[self._mode]
        # a linear passes by its decomposed weight in half of the mixed steps
        whole = options.mixed / 2
        each = (1 - whole) * trained(shapes, setting.kept, setting.tokens)
        each += whole * trained(shapes, 1.0, setting.tokens)
        step = each * passes / 3 * blocks
        step += costs.head().flops
        work = Work(single=options.epochs * setting.sequences * step)
        micro = max(setting.sequences // options.batches, 1)
        filling = (micro + workers - 1) / micro
        keeps_states = self.keeps_states(held)
        stored = STATE_BYTES[self._mode] if keeps_states else costs.out_itemsize
        state = float(stored * blocks) * kept_values(shapes, setting.kept)
        snapshots = options.epochs * options.batches / options.every
        saving = Work(write=state * snapshots / workers)

        def take(rates: Rates) -> float:
            return work.seconds(rates) / workers * filling + saving.seconds(rates)

        return StageForecast(
            name="train",
            flops=work.flops,
            seconds=setting.seconds(take),
            device=self._memory(self._mode, min(workers, blocks)),
        )

    def shares(self) -> Mapping[str, Work]:
        """A sequence passes a block: of the dense model for the targets, and in training.

        A backward pass repeats the forward pass; the last shard has the head beside its blocks,
        which are fewer for the targets than in training.
        """
        setting, costs = self.setting, self.setting.costs
        blocks = -(-setting.shapes.num_blocks // min(setting.workers, setting.shapes.num_blocks))
        few = -(-setting.shapes.num_blocks // setting.shards)
        forward = Work(single=trained(setting.shapes, setting.kept, setting.tokens) / 3)
        head = Work(single=costs.head().flops / blocks)
        backward = forward.times(1 + BACKWARD[self._mode])
        values = float(kept_values(setting.shapes, setting.kept))
        return {
            "open": costs.load(1),
            "take": Work(read=values * setting.costs.out_itemsize),
            "forward": forward,
            "score": costs.forward(1) + costs.head().times(1 / 3 / few),
            "backward": backward,
            "turn": backward + head,
            "evaluate": forward + head.times(1 / 3),
            "update": Work(read=16 * values),
            "snapshot": Work(write=STATE_BYTES[self._mode] * values),
            "keep": Work(write=values * costs.out_itemsize),
            "commit": Work(write=values * costs.out_itemsize),
        }

    def _memory(self, mode: str, workers: int) -> Footprint:
        setting, options = self.setting, self._options
        held = training(
            setting.shapes,
            setting.kept,
            setting.is_even,
            mode,
            workers=workers,
            tokens=setting.tokens,
            stored_targets=options.targets == "stored",
        )
        if not options.mixed:
            return held
        # the dense shard that the weights are read from has all of its blocks
        blocks = -(-setting.shapes.num_blocks // workers)
        mixed = blocks * setting.shapes.block_values * setting.costs.itemsize
        return Footprint({**held.parts, "decomposed weights": mixed})

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        """Targets, and snapshots: states, or the best values if states are too large.

        Trained blocks are written while the last and the best snapshot exist.
        """
        held = {**before, "targets": self._targets}
        written = self.setting.costs.out_itemsize * self.setting.kept_values
        state = STATE_BYTES[self._mode] * self.setting.kept_values
        count = min(self._snapshots_made, MOST_SNAPSHOTS)
        states = max(count * state, min(count, 2) * state + written)
        room = max(TRAINING_ROOM * self.setting.costs.model_bytes, SMALL_BYTES)
        fits = sum(held.values()) + states <= room
        snapshots = {"snapshots": states} if fits else {BEST_VALUES: written}
        return {**held, **snapshots}, {**held, "trained blocks": written}

    def keeps_states(self, held: Footprint) -> bool:
        return BEST_VALUES not in held.parts

    @property
    def _snapshots_made(self) -> int:
        """Number of snapshots in a training; the start is not one."""
        steps = self._options.epochs * min(self._options.batches, self.setting.sequences)
        return -(-steps // self._options.every)

    @property
    def _targets(self) -> float:
        """Bytes of the targets: values and ids of the dense model's top-k, and one for the rest."""
        setting, options = self.setting, self._options
        if options.targets != "stored":
            return 0.0
        outcomes = min(options.top_k, setting.shapes.vocabulary)
        return float(setting.sequences * setting.tokens * (8 * outcomes + 4))

    def remedy(self) -> str:
        """The fewest workers with which each mode fits."""
        setting, ways = self.setting, []
        for mode in TRAINED_BYTES:
            counts = range(setting.workers, setting.shapes.num_blocks + 1)
            fits = (n for n in counts if setting.room.fits(self._memory(mode, n)))
            if (workers := next(fits, None)) is not None:
                ways.append(f"--train {mode} with {workers} workers")
        return f"what fits: {', '.join(ways)}" if ways else "--train none leaves it out"


def training(
    shapes: Shapes,
    kept: float,
    even: bool,
    mode: str,
    *,
    workers: int,
    tokens: int,
    stored_targets: bool,
) -> Footprint:
    """Footprint of one worker's shard, if `workers` hold the whole model between them."""
    blocks = -(-shapes.num_blocks // workers)
    # over many blocks sizes even out
    trained = trained_block(shapes, kept, even or blocks > 2, TRAINED_BYTES[mode])
    ends = 4 * max(shapes.front_values, shapes.head_values)
    dense = 0 if stored_targets else blocks * shapes.block_values * 4
    logits = 4 * 4 * tokens * shapes.vocabulary
    between = 4 * tokens * shapes.hidden * (blocks + 2 * workers)
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "training state": blocks * trained,
            "embeddings or head": ends,
            "dense copy": dense,
            "activations": activation_bytes(shapes, tokens, 4, 1) + logits + between,
        }
    )
