"""Options of the whole-model training, and the assignment of sequences to steps."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.models.training.refine_options import check_optimizer_options, rate, split
from orchestrator.randomness import Randomness
from orchestrator.recipe.options import check_choice, check_number, check_whole

MODES = ("all", "lean", "light")
TARGETS = ("stored", "recomputed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of the training on the dense model's predictions and on the text."""

    epochs: int = 10
    """Largest number of epochs; also the length of the schedule."""
    batches: int = 7
    """Steps per epoch; the training sequences are divided among them as evenly as possible."""
    learning_rate: float = 1e-4
    """Largest learning rate, reached at the end of the warm-up."""
    weight_decay: float = 0.01
    warm_up: float = 0.1
    """Fraction of all steps over which the rate rises linearly."""
    floor: float = 0.1
    """Final value of the cosine, as a fraction of the largest rate."""
    clip: float = 1.0
    """Largest norm of a step's gradient; larger gradients are scaled down to it."""
    divergence: float = 1.0
    """Weight of KL(dense || compressed), averaged over tokens."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy of the text's next tokens, averaged over predictions."""
    temperature: float = 1.0
    """Temperature by which both models' logits are divided in the KL."""
    targets: str = "stored"
    """`stored`: the dense model runs once and its top-k outcomes are stored. `recomputed`: it runs
    alongside the compressed one in every step, for the full KL, at its cost in memory and time."""
    top_k: int = 256
    """Outcomes stored per token; all others are summed into one."""
    held_out: float = 0.125
    """Fraction of the sequences held out from training to choose the best state."""
    every: int = 7
    """Steps between snapshots; the held-out loss is evaluated at each."""
    patience: int = 5
    """Training ends after this number of snapshots without a better state."""
    mixed: float = 0.0
    """Fraction of the steps over which linears turn from the weight that was decomposed to what
    the plan stores: each linear by chance in each step, with a chance that falls from 1 to 0; 0:
    all of them from the first step on."""

    def __post_init__(self) -> None:
        check_optimizer_options("training", self)
        check_whole("training: batches", self.batches, 1, 100_000)
        check_number("training: divergence", self.divergence, 0, 1e6)
        check_number("training: cross_entropy", self.cross_entropy, 0, 1e6)
        check_number("training: temperature", self.temperature, 1e-2, 1e2)
        check_choice("training: targets", self.targets, TARGETS)
        check_whole("training: top_k", self.top_k, 1, 1_000_000)
        check_whole("training: every", self.every, 1, 100_000)
        check_number("training: mixed", self.mixed, 0, 1)
        if not self.divergence and not self.cross_entropy:
            raise UsageError("training: divergence and cross_entropy are 0; one must be above")

    def to_json(self) -> dict[str, Any]:
        """Return the options by name, without `mixed` if it is off: units have the keys that they
        had before it was there."""
        options = asdict(self)
        return options if self.mixed else {n: each for n, each in options.items() if n != "mixed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Assignment of sequences to steps."""

    options: TrainOptions
    batches: tuple[tuple[int, ...], ...]
    """The sequences of each step, in the order in which their gradients are added up."""
    held_out: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.batches)

    @property
    def mixed_steps(self) -> float:
        """Steps over which linears turn from their decomposed weights to their forms."""
        return self.options.mixed * self.steps

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return rate(step, self.steps, self.options)

    def first(self, steps: int) -> "Course":
        """Return the course of the first steps."""
        return replace(self, batches=self.batches[:steps])

    def following(self, step: int) -> int:
        """Number of steps completed at the next snapshot after the one at `step`."""
        return min(step + self.options.every, self.steps)


def plan_course(options: TrainOptions, sequences: int, randomness: Randomness) -> Course:
    """Plan the steps over `sequences`; each epoch's order is drawn from the seed and its number.

    Raises:
        ValueError: Fewer than two sequences.
    """
    training, held_out = split(sequences, options.held_out)
    number = min(options.batches, len(training))
    steps = options.epochs * number
    batches = _drawn(training, number, steps, randomness)
    return Course(options=options, batches=batches, held_out=tuple(held_out))


def plan_steps(
    options: TrainOptions, sequences: int, randomness: Randomness, *, size: int, steps: int
) -> Course:
    """Plan `steps` steps of at most `size` sequences, as in `plan_course`, over as many epochs.

    Raises:
        ValueError: Fewer than two sequences.
    """
    training, held_out = split(sequences, options.held_out)
    batches = _drawn(training, -(-len(training) // size), steps, randomness)
    return Course(options=options, batches=batches, held_out=tuple(held_out))


def _drawn(
    training: list[int], number: int, steps: int, randomness: Randomness
) -> tuple[tuple[int, ...], ...]:
    """Divide the sequences of each epoch into `number` batches; gives those of `steps` steps."""
    # imported here because a forecast reads the options without torch
    import torch

    batches: list[tuple[int, ...]] = []
    while len(batches) < steps:
        generator = randomness.model_order(len(batches) // number)
        order = torch.randperm(len(training), generator=generator)
        for places in order.tensor_split(number):
            batches.append(tuple(training[place] for place in places.tolist()))
    return tuple(batches[:steps])
