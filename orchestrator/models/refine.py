"""Refining compressed blocks: their parameters trained to give what the dense blocks give.

Shape suffixes: B sequences, T tokens, C channels.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers.pytorch_utils import Conv1D

from orchestrator.models.chunk import Chunk
from orchestrator.models.modules import LowRankLinear
from orchestrator.models.refine_options import RefineOptions, rate, split
from orchestrator.models.shard import Shard

Stop = Literal["end", "patience", "diverged"]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one epoch gave."""

    train: float
    """Mean squared error over the training tokens, each batch before its own step."""
    held_out: float
    """Mean squared error over the held-out tokens, after the last step."""
    gradient: float
    """Mean over the steps of the gradient's norm before it is clipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """The best state that training came through, the start included."""

    tensors: Mapping[str, Tensor]
    """Every trained parameter by its name in the model, on the CPU."""
    start: float
    """The held-out loss before the first step."""
    epochs: tuple[Epoch, ...]
    best: int
    """Epochs after which the state was the best; 0 is the start, bit for bit."""
    steps: int
    stop: Stop

    def facts(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {
            "start": self.start,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "steps": self.steps,
            "stop": self.stop,
        }


def refine(
    shard: Shard,
    inputs: Sequence[Chunk],
    targets: Sequence[Chunk],
    options: RefineOptions,
    seed: int,
) -> Refined:
    """Trains a shard of a compressed model until done; see `Refinement`.

    The shard is left in the best state, so that passing chunks through it gives the inputs of the
    block behind it.
    """
    with Refinement(shard, inputs, targets, options, seed) as refinement:
        while refinement.stop is None:
            refinement.epoch()
        return refinement.result()


class Refinement:
    """The training of a shard's blocks, epoch by epoch, towards given outputs.

    Minimises the mean over the tokens inside the mask and over the channels of `(f(x) - y)^2`, f
    the shard's blocks, x their inputs, y the dense blocks' outputs, both the residual stream. What
    else a family hands from block to block is passed in and not compared.

    Trained are the blocks' own parameters: factors, sparse values on their support, norms, biases;
    dense weights only where the options say so. A basis that other blocks use too stays as it is.
    AdamW with decay on all of them, a linear warm-up, a cosine to the floor, clipped gradients.

    Everything is float32 on any device (float64 if the shard is). The order of the chunks comes
    from (seed, first block, epoch) alone; one step adds up the gradients of its chunks one by one
    in that order, a chunk being the quantum. So a result is a function of its arguments and the
    environment, to the bit, and one that was interrupted goes on from a `snapshot` as if it were
    not. Forward and backward run once a step and chunk.

    Memory: 20 bytes a trained parameter (value, gradient, two moments, best state), 4 a parameter
    that is not, and the activations of one chunk. `inputs` and `targets` are indexed once an epoch,
    so they may be read from where they lie. An epoch costs about three forward passes over the
    chunks: 3 multiply-adds a parameter and token.

    Args:
        shard: Of a compressed model, opened in float32; usually one block.
        inputs: Chunks at the shard's input: of the dense model, or of the compressed blocks before.
        targets: The same chunks behind the dense model's blocks.

    Raises:
        ValueError: The chunks do not belong together, or the shard computes in 16 bits.

    References:
        AA-SVD (arXiv:2604.02119): block-wise refinement, where x are the compressed prefix's
        outputs. Its code trains every parameter of a block (with uniform ranks none stays dense),
        uses 8 batches of 32 sequences in one fixed order, starts its warm-up at rate 0, so that the
        first step does nothing, holds nothing out and keeps the last state.
    """

    def __init__(
        self,
        shard: Shard,
        inputs: Sequence[Chunk],
        targets: Sequence[Chunk],
        options: RefineOptions,
        seed: int,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} chunks go in, {len(targets)} are the targets")
        self._shard, self._inputs, self._targets = shard, inputs, targets
        self._options, self._seed = options, seed
        self._training, self._held_out = split(len(inputs), options.held_out)
        self._batches = min(options.batches, len(self._training))
        self._parameters = trained_parameters(shard, dense=options.dense)
        dtypes = {parameter.dtype for parameter in self._parameters.values()}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            found = ", ".join(sorted(map(str, dtypes))) or "nothing to train"
            raise ValueError(f"the shard of blocks {shard.blocks} has {found}; float32 is needed")
        (self._dtype,) = dtypes
        # tied parameters of one shard are one
        self._distinct = list({id(p): p for p in self._parameters.values()}.values())
        self._required = {p: p.requires_grad for p in shard.parameters().values()}
        decay = options.weight_decay
        self._optimizer = torch.optim.AdamW(self._distinct, weight_decay=decay)
        self._epochs: list[Epoch] = []
        self._start: float | None = None
        self._best, self._best_state = 0, self._state()

    def __enter__(self) -> Self:
        """From here on gradients reach the trained parameters and no others."""
        for parameter in self._required:
            parameter.requires_grad_(False)
        for parameter in self._distinct:
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the shard's parameters as they are, without gradients."""
        for parameter, required in self._required.items():
            parameter.grad = None
            parameter.requires_grad_(required)

    @property
    def stop(self) -> Stop | None:
        """Why training is over; None while it is not."""
        done = len(self._epochs)
        if done and not math.isfinite(self._epochs[-1].held_out):
            return "diverged"
        if done == self._options.epochs:
            return "end"
        return "patience" if done - self._best >= self._options.patience else None

    def epoch(self) -> Epoch:
        """Performs the next epoch."""
        lowest = self._lowest()
        train = tokens = gradient = 0.0
        first = len(self._epochs) * self._batches
        for step, batch in enumerate(self._order(len(self._epochs)), start=first):
            weight, error = self._accumulate(batch)
            train, tokens = train + error, tokens + weight
            gradient += float(clip_grad_norm_(self._distinct, self._options.clip))
            self._optimizer.param_groups[0]["lr"] = rate(step, self._steps, self._options)
            self._optimizer.step()
            self._optimizer.zero_grad()
        held_out = self._evaluate()
        self._epochs.append(
            Epoch(train=train / tokens, held_out=held_out, gradient=gradient / self._batches)
        )
        if held_out < lowest:
            self._best, self._best_state = len(self._epochs), self._state()
        return self._epochs[-1]

    def result(self) -> Refined:
        """Puts the best state into the shard and gives it."""
        start = self.start
        self._load(self._best_state)
        return Refined(
            tensors={name: tensor.cpu() for name, tensor in self._best_state.items()},
            start=start,
            epochs=tuple(self._epochs),
            best=self._best,
            steps=len(self._epochs) * self._batches,
            stop=self.stop or "end",
        )

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next epoch depends on: tensors, 16 bytes a trained parameter, and JSON."""
        tensors = {f"best.{name}": tensor for name, tensor in self._best_state.items()}
        for name, parameter in self._parameters.items():
            tensors[f"value.{name}"] = parameter.detach()
            # a parameter that has had no gradient has none of them
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"{each}.{name}": moments[each] for each in MOMENTS if each in moments}
        facts = {
            "start": self.start,
            "epochs": [asdict(epoch) for epoch in self._epochs],
            "best": self._best,
        }
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Goes on from a snapshot of a refinement of the same shard, chunks, options and seed."""
        self._start, self._best = facts["start"], facts["best"]
        self._epochs = [Epoch(**epoch) for epoch in facts["epochs"]]
        names = self._parameters
        self._load({name: tensors[f"value.{name}"] for name in names})
        self._best_state = {name: tensors[f"best.{name}"].to(p.device) for name, p in names.items()}
        for name, parameter in names.items():
            keys = {each: f"{each}.{name}" for each in MOMENTS}
            if tensors.keys() >= set(keys.values()):
                state = {each: tensors[key].to(parameter).clone() for each, key in keys.items()}
                step = torch.tensor(float(len(self._epochs) * self._batches))
                self._optimizer.state[parameter] = {"step": step, **state}

    @property
    def start(self) -> float:
        """The held-out loss before the first step."""
        if self._start is None:
            self._start = self._evaluate()
        return self._start

    @property
    def _steps(self) -> int:
        return self._options.epochs * self._batches

    def _order(self, epoch: int) -> Iterator[list[int]]:
        """The training chunks of every batch of an epoch."""
        key = json.dumps([self._seed, self._shard.blocks.start, epoch])
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        order = torch.randperm(len(self._training), generator=generator)
        for places in order.tensor_split(self._batches):
            yield [self._training[place] for place in places.tolist()]

    def _accumulate(self, batch: Sequence[int]) -> tuple[float, float]:
        """Adds the gradients of a batch's loss; its tokens and the sum of their errors."""
        targets = [self._targets[index] for index in batch]
        tokens = sum(int(target.mask.sum()) for target in targets)
        total = 0.0
        for index, target in zip(batch, targets, strict=True):
            error = self._error(index, target, self._shard.trace) / max(tokens, 1)
            torch.autograd.backward(error)
            total += float(error.detach())
        return float(tokens), total * tokens

    def _evaluate(self) -> float:
        """The loss over the held-out chunks."""
        tokens, total = 0, 0.0
        for index in self._held_out:
            target = self._targets[index]
            tokens += int(target.mask.sum())
            total += float(self._error(index, target, self._shard.forward))
        return total / max(tokens, 1)

    def _error(self, index: int, target: Chunk, run: Callable[[Chunk], Chunk]) -> Tensor:
        """The sum over a chunk's tokens of the squared error, averaged over the channels."""
        chunk = self._inputs[index]
        if chunk.index != target.index or not torch.equal(chunk.mask, target.mask):
            raise ValueError(f"input {chunk.index} and target {target.index} are different chunks")
        payload = chunk.payload and chunk.payload.map(self._cast)
        found_BTC = _hidden(run(chunk.with_payload(payload)))
        gap_BTC = found_BTC - _hidden(target).to(found_BTC)
        # what stands at padding may be anything
        gap_BTC = gap_BTC.where(target.mask.to(gap_BTC.device)[..., None], 0.0)
        return gap_BTC.square().sum() / gap_BTC.shape[-1]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _lowest(self) -> float:
        """The best held-out loss that there was before this epoch."""
        return self._epochs[self._best - 1].held_out if self._best else self.start

    def _state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[name])


def _hidden(chunk: Chunk) -> Tensor:
    """The residual stream that a chunk carries, [B, T, C]."""
    assert chunk.payload is not None
    return chunk.payload.tensors()[0]


def trained_parameters(shard: Shard, *, dense: bool) -> dict[str, nn.Parameter]:
    """The parameters of a shard that refinement trains, by their names in the model."""
    own = shard.own_parameters().items()
    return {name: p for name, p in own if dense or not _is_dense_weight(shard, name)}


def _is_dense_weight(shard: Shard, name: str) -> bool:
    """Whether it is the weight of a plain linear that is no factor."""
    path, _, child = name.rpartition(".")
    if child != "weight" or not isinstance(shard.module(path), nn.Linear | Conv1D):
        return False
    return not isinstance(shard.module(path.rpartition(".")[0]), LowRankLinear)
