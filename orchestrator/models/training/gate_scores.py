"""Scores of gates of a shard's linears, and their steps of Adam under an L1 pull.

Shape suffixes: K directions of a linear that a plan may store, N gates: K + 1, its directions and
last its tail, or without a tail all min(O, I) directions, those that may be stored first.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.device.transport import CPU
from orchestrator.errors import InfeasibleError
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear

BETAS = (0.9, 0.999)
EPSILON = 2e-10
"""Adam's 1e-8 in the units of the authors' masks, which begin at 0.02, in those of scores."""
LAST_STEP = 2**24
"""Bound of the steps, which are whole numbers of float32."""
STATE = ("score", "mean", "square", "closed")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePull:
    """Weights of the gates of a linear in the L1 term, by the number K' of open directions.

    A direction weighs what the form saves from K' to K' - 1, and the tail what it saves from the
    dense weight to K': what closed directions would have saved is the tail's while it is open.
    """

    direction: Tensor
    """float32 [K + 1]; of K' = 0 as of 1."""
    tail: Tensor
    """float32 [K + 1]."""

    @classmethod
    def by_count(cls, linear: Linear, form: Form, adapters: int = 0) -> "GatePull":
        """Return equal weights of all gates."""
        ones = torch.ones(num_directions(linear, form, adapters) + 1)
        return cls(direction=ones, tail=ones)

    @classmethod
    def by_cost(cls, linear: Linear, form: Form, mean: float, adapters: int = 0) -> "GatePull":
        """Return the numbers of values that closing a gate saves, over `mean`."""
        ranks = range(num_directions(linear, form, adapters) + 1)
        values = [form.factor_values(linear, adapters + rank) for rank in ranks]
        saved = [values[max(rank, 1)] - values[max(rank, 1) - 1] for rank in ranks]
        tail = [linear.values - each for each in values]
        return cls(direction=torch.tensor(saved) / mean, tail=torch.tensor(tail) / mean)


def num_directions(linear: Linear, form: Form, adapters: int = 0) -> int:
    """Return the number of directions that may be stored, each with a gate: those below break-even
    less the rank of the adapter, which is stored with them."""
    return max(form.break_even(linear) - 1 - adapters, 0)


def gate_pulls(
    linears: list[Linear], form: Form, penalty_by: str, adapters: int = 0
) -> dict[str, GatePull]:
    """Return the pulls of the linears that have directions, by name.

    By cost, the mean is that of the directions of all linears: it is one, whatever the sizes.
    """
    gated = [each for each in linears if num_directions(each, form, adapters)]
    if penalty_by == "count":
        return {each.name: GatePull.by_count(each, form, adapters) for each in gated}
    counts = {each.name: num_directions(each, form, adapters) for each in gated}
    values = sum(
        int(form.factor_values(each, adapters + counts[each.name]))
        - int(form.factor_values(each, adapters))
        for each in gated
    )
    mean = values / max(sum(counts.values()), 1)
    return {each.name: GatePull.by_cost(each, form, mean, adapters) for each in gated}


class LearnedGates(ABC):
    """Gates of one linear with the numbers that are learned for them, float32 on their device.

    Without a tail there are N = R of them.
    """

    def __init__(self, gated: GatedLowRankLinear) -> None:
        self._gates, self._tail = gated.gates_R, gated.tail
        self._parts = [self._gates] if self._tail is None else [self._gates, self._tail]

    @property
    def count(self) -> int:
        """Number of gates, N."""
        return sum(map(len, self._parts))

    @property
    def numbers(self) -> int:
        """Number of trained values."""
        return self.count

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss for every gate, closed ones too, float32 [N]; 0 before a pass."""
        parts = self._parts
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in parts]
        return torch.cat(found)

    def clear(self) -> None:
        """Clear the gradient."""
        for part in self._parts:
            part.grad = None

    @torch.no_grad()
    def set(self, gates_N: Tensor) -> None:
        """Write the gates of the next passes."""
        sizes = [len(part) for part in self._parts]
        for part, gates in zip(self._parts, torch.split(gates_N, sizes), strict=True):
            part.copy_(gates)

    @abstractmethod
    def update(self, step: int, rate: float, *, penalty: float, polarisation: float) -> None:
        """Perform a step, counted from 1, clear the gradient, and set the gates."""

    @abstractmethod
    def apply(self) -> None:
        """Set the gates by the state."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, themselves, by name."""

    @abstractmethod
    def open_gates(self) -> Tensor:
        """Return which gates are open, bool [N]."""

    def counts(self) -> tuple[int, bool]:
        """Return the number of open directions that may be stored, and True if the linear is
        whole: its tail is open."""
        open_N = self.open_gates()
        return int(open_N[:-1].sum()), bool(open_N[-1])

    def size(self) -> Tensor:
        """Part of the kept fraction that this linear is, float64 []; 0 if the loss has no size."""
        return torch.zeros((), dtype=torch.float64, device=self._gates.device)


class GateScores(LearnedGates):
    """Scores of the gates of one linear; a gate is open, 1, while its score is above 0.

    With h the gradient of the loss for an open gate, λ and w as in `allocate.gates.learned`, step
    t is, for open gates,

        g = h + λ w,    m <- m + (1 - b1)(g - m),    v <- b2 v + (1 - b2) g²,
        s <- s - rate / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + 2e-10),

    in float32 on the gates' device, and for closed ones the same with g = 0. A gate closes in the
    step after which s is at most 0; m is then above 0 and only decays, so none opens again. Of a
    linear whose directions are all closed the last one to close passes on as the one that is kept.

    Without a tail all N directions have gates, of which those behind the first K are never stored:
    the linear is whole as long as more than K gates are open, in whatever place.

    Cost of a step: O(N). The device is not read.

    Args:
        pull: Its size says K.
    """

    def __init__(self, gated: GatedLowRankLinear, pull: GatePull) -> None:
        super().__init__(gated)
        device = self._gates.device
        self._direction, self._tail_pull = pull.direction.to(device), pull.tail.to(device)
        self._stored = len(pull.direction) - 1
        self.score = torch.ones(self.count, device=device)
        self.mean, self.square = torch.zeros_like(self.score), torch.zeros_like(self.score)
        self.closed = torch.zeros(self.count, dtype=torch.int32, device=device)
        """Step in which the gate closed; 0: it is open."""

    @property
    def open(self) -> Tensor:
        """Open gates, bool [N]."""
        return self.closed == 0

    @torch.no_grad()
    def update(self, step: int, rate: float, *, penalty: float, polarisation: float = 0.0) -> None:
        """Perform a step, counted from 1, and clear the gradient."""
        first, second = BETAS
        is_open = self.open
        directions = is_open[: len(self._gates)].sum().clamp(max=self._stored)
        pull = self._direction[directions].repeat(len(self.score))
        if self._tail is not None:
            pull[-1] = self._tail_pull[directions]
        gradient = torch.where(is_open, self.gradient + penalty * pull, 0.0)
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = self.square.sqrt().div_((1 - second**step) ** 0.5).add_(EPSILON)
        self.score.addcdiv_(self.mean, root, value=-rate / (1 - first**step))
        self.closed.masked_fill_(is_open & (self.score <= 0), step)
        self.clear()
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Write the gates of the next passes."""
        gates = self.open.float()
        # scores of closed gates are below those of open ones: the last of all is kept
        last = scores_after(self.score, self.closed, LAST_STEP)[: self._stored].argmax()
        gates[: self._stored].index_fill_(0, last, 1.0)
        self.set(gates)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, themselves, by name."""
        return {part: getattr(self, part) for part in STATE}

    def open_gates(self) -> Tensor:
        """Return which gates are open, bool [N]; those with a score above 0."""
        assert bool((self.open == (self.score > 0)).all()), "a gate has opened again"
        return self.open

    def counts(self) -> tuple[int, bool]:
        if self._tail is not None:
            return super().counts()
        open_N = self.open_gates()
        return int(open_N[: self._stored].sum()), int(open_N.sum()) > self._stored


class GateTraining:
    """Learned gates of a shard's blocks; see `GateScores` and `PolarisedGates`.

    The state of a block is independent of other blocks, so a model may be cut into shards in any
    way, and the state of one cut continues in another, bit for bit.

    Args:
        gates: Gates by block and by the name of the linear.
    """

    def __init__(self, gates: Mapping[int, Mapping[str, LearnedGates]]) -> None:
        self._gates = gates
        self._named = {name: found for each in gates.values() for name, found in each.items()}

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks that have gates."""
        return [block for block, each in self._gates.items() if each]

    @property
    def num_parameters(self) -> dict[int, int]:
        """Number of gates and values of adapters of each block."""
        return {b: sum(e.numbers for e in self._gates[b].values()) for b in self.blocks}

    def check_room(self, free: int) -> None:
        """Raise InfeasibleError if `free` bytes of device memory do not hold the gradients."""
        needed = 4 * sum(self.num_parameters.values())
        if needed > free:
            raise InfeasibleError(
                f"learn: gradients of gates take {needed} bytes besides the shard, but {free} are "
                "free on its device; give more workers"
            )

    def collect(self) -> None:
        """No-op: the gates' own gradients are those of the scores."""

    def norms(self) -> dict[int, float]:
        """Squared norms of the gates' gradients of all blocks, of the loss without the L1 term."""
        found: dict[int, float] = {}
        for block, each in self._gates.items():
            squares = [
                torch.linalg.vector_norm(gates.gradient, dtype=torch.float64).square()
                for gates in each.values()
            ]
            found[block] = sum(torch.stack(squares).tolist(), 0.0) if squares else 0.0
        return found

    def update(self, step: int, rate: float, penalty: float, polarisation: float) -> None:
        """Perform a step of all gates."""
        for gates in self._named.values():
            gates.update(step, rate, penalty=penalty, polarisation=polarisation)

    def sizes(self) -> dict[str, float]:
        """Return the part of the kept fraction that each linear is, with one device read."""
        if not self._named:
            return {}
        found = torch.stack([gates.size() for gates in self._named.values()]).tolist()
        return dict(zip(self._named, found, strict=True))

    def counts(self) -> dict[str, tuple[int, bool]]:
        """Return the counts of each linear, see `LearnedGates.counts`."""
        return {name: gates.counts() for name, gates in self._named.items()}

    def state(self, block: int) -> dict[str, Tensor]:
        """Return everything that a block's next step depends on, on the CPU."""
        return {
            f"{part}.{name}": tensor.to(CPU, copy=True)
            for name, gates in self._gates[block].items()
            for part, tensor in gates.state().items()
        }

    def load(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore a block from the tensors of `state`."""
        for name, gates in self._gates[block].items():
            for part, tensor in gates.state().items():
                tensor.copy_(tensors[f"{part}.{name}"])
            gates.apply()


def final_scores(state: Mapping[str, Tensor], last: int) -> dict[str, Tensor]:
    """Return the scores of a block's linears after the step `last`, [N], from its state."""
    names = [name.removeprefix("score.") for name in state if name.startswith("score.")]
    return {n: scores_after(state[f"score.{n}"], state[f"closed.{n}"], last) for n in names}


def scores_after(score: Tensor, closed: Tensor, last: int) -> Tensor:
    """Return scores [N] after the step `last`: of a gate that closed in step t, -(last - t + 1)."""
    return torch.where(closed == 0, score, (closed - last - 1).to(score.dtype))


def with_tail(scores_N: Tensor, stored: int) -> Tensor:
    """Return the scores [K + 1] of the K stored directions and of a tail, from those of all N.

    A linear is whole as long as more than K gates are open: the tail closes with the gate of the
    (K + 1)-th best direction, whether that is stored or not.
    """
    ranked_N = scores_N.sort(descending=True).values
    return torch.cat([scores_N[:stored], ranked_N[stored : stored + 1]])
