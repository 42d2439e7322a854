"""Refinement: train compressed blocks to reproduce the outputs of the dense blocks.

Shape suffixes: B sequences, T tokens, C channels.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers.pytorch_utils import Conv1D

from orchestrator.device.strict import strict
from orchestrator.device.transport import bring
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.refine_ledger import Account, Epoch, Ledger, Stop
from orchestrator.models.training.refine_options import RefineOptions, divide, rate
from orchestrator.randomness import Randomness


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined(Account):
    """Best state of the training, the initial state included."""

    tensors: Mapping[str, Tensor]
    """Trained parameters by their names in the model, on the CPU."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Gradient of a part of a step's batch."""

    losses: tuple[float, ...]
    """Losses of its chunks, each divided by the number of tokens of the whole batch."""
    tokens: int
    """Number of tokens of the whole batch."""
    gradients: Mapping[int, Tensor]
    """Gradients by the parameter's position; without parameters that the chunks do not reach."""


def refine(
    shard: Shard,
    inputs: Sequence[Chunk],
    targets: Sequence[Chunk],
    *,
    options: RefineOptions,
    randomness: Randomness,
) -> Refined:
    """Train a shard of a compressed model until a stopping rule applies; see `Refinement`.

    The shard is left in the best state, so that passing chunks through it gives the inputs of the
    next block.
    """
    with Refinement(shard, inputs, targets, options=options, randomness=randomness) as refinement:
        while refinement.stop is None:
            refinement.epoch()
        return refinement.result()


class Refinement:
    """Training of a shard's blocks towards given outputs, epoch by epoch.

    Minimises the mean of `(f(x) - y)^2` over the tokens inside the mask and over the channels: f
    the shard's blocks, x their inputs, y the dense blocks' outputs, both the residual stream. Other
    parts of the block state are passed in and not compared.

    Trained are the blocks' own parameters: factors, sparse values on their support, norms, biases;
    dense weights only if the options ask for it. A basis also used by other blocks is not trained.
    AdamW with decay on all of them, a linear warm-up, a cosine to the floor, clipped gradients.

    All computations are float32 on any device (float64 if the shard is). The order of the chunks
    depends only on the seed, the first block and the epoch. A step's batch is divided into slices.
    Each slice sums the gradients of its chunks one by one in that order, and the slices are summed
    in order. The result is therefore a bit-exact function of the arguments and the environment.
    Each chunk takes one forward and one backward pass per step.

    Replicas: if several workers train a block, each has its own refinement. They divide the slices
    (`slice`) and the held-out chunks (`error`) among them, and each performs every step with the
    gradients of all (`merge`, `step`), so that all have identical bits (`digest`) without sending
    parameters. `epoch` gives the same with a single worker.

    Memory: 24 bytes per trained parameter (value, gradient and that of a slice, two moments, best
    state), 4 per other parameter, and the activations of one chunk. An epoch costs about three
    forward passes over the chunks: 3 multiply-adds per parameter and token.

    Args:
        shard: Shard of a compressed model, opened in float32; usually one block.
        inputs: Chunks at the shard's input: from the dense model, or from the preceding compressed
            blocks.
        targets: The same chunks at the output of the dense model's blocks.

    Raises:
        ValueError: The chunks do not match, or the shard computes in 16 bits.

    References:
        AA-SVD (arXiv:2604.02119): block-wise refinement, where x are the compressed prefix's
        outputs. Departures: its code trains all parameters of a block (with uniform ranks no weight
        stays dense), uses 8 batches of 32 sequences in one fixed order, starts the warm-up at rate
        0, so that the first step has no effect, holds out no chunks and keeps the last state.
    """

    def __init__(
        self,
        shard: Shard,
        inputs: Sequence[Chunk],
        targets: Sequence[Chunk],
        *,
        options: RefineOptions,
        randomness: Randomness,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} input chunks, but {len(targets)} target chunks")
        self._shard, self._inputs, self._targets = shard, inputs, targets
        self._options, self._randomness = options, randomness
        self._ledger = Ledger(len(inputs), options)
        self._parameters = trained_parameters(shard, dense=options.dense)
        dtypes = {parameter.dtype for parameter in self._parameters.values()}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            found = ", ".join(sorted(map(str, dtypes))) or "no trained parameter"
            raise ValueError(f"the shard of blocks {shard.blocks} has {found}; float32 is needed")
        (self._dtype,) = dtypes
        # parameters tied within a shard are trained once
        self._distinct = list({id(p): p for p in self._parameters.values()}.values())
        self._required = {p: p.requires_grad for p in shard.parameters().values()}
        decay = options.weight_decay
        # fused on CUDA: one kernel; the default uses several and temporaries of all parameters
        fused = shard.device.type == "cuda" or None
        self._optimizer = torch.optim.AdamW(self._distinct, weight_decay=decay, fused=fused)
        self._steps = 0
        self._best_state = self._state()

    def __enter__(self) -> Self:
        """Enable gradients for the trained parameters only."""
        for parameter in self._required:
            parameter.requires_grad_(False)
        for parameter in self._distinct:
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore `requires_grad` of the parameters and drop gradients; values are kept."""
        for parameter, required in self._required.items():
            parameter.grad = None
            parameter.requires_grad_(required)

    @property
    def stop(self) -> Stop | None:
        """Reason why training has ended; None while it has not."""
        return self._ledger.stop

    def epoch(self) -> Epoch:
        """Perform the next epoch."""
        ledger, _ = self._ledger, self.start  # evaluates the start first
        epoch = len(ledger.epochs)
        for batch in range(ledger.batches):
            losses: list[float] = []
            gradients: dict[int, Tensor] = {}
            for part in range(ledger.parts(batch)):
                found = self.slice(epoch, batch, part)
                losses += found.losses
                gradients = merge([gradients, found.gradients])
            ledger.summed(losses, found.tokens)
            ledger.stepped(self.step(gradients))
        if ledger.evaluated([self.error(place) for place in range(len(ledger.held_out))]):
            self.keep()
        return ledger.epochs[-1]

    @strict()
    def slice(self, epoch: int, batch: int, part: int) -> Slice:
        """Compute one slice of the gradient of a step's loss."""
        chunks = self._batch(epoch, batch)
        tokens = sum(int(self._inputs[index].mask.sum()) for index in chunks)
        losses = []
        for index in divide(chunks, self._ledger.parts(batch))[part]:
            error = self._error(index, self._shard.trace) / max(tokens, 1)
            torch.autograd.backward(error)
            losses.append(error.detach())
        gradients = {}
        for place, parameter in enumerate(self._distinct):
            if parameter.grad is not None:
                gradients[place] = parameter.grad.contiguous()
                parameter.grad = None
        # one read for all, so that the host can run ahead of the device until here
        values = torch.stack(losses).tolist() if losses else []
        return Slice(tuple(values), tokens, gradients)

    def step(self, gradients: Mapping[int, Tensor]) -> float:
        """Perform the next step with the merged gradients; returns their norm before clipping."""
        for place, gradient in gradients.items():
            parameter = self._distinct[place]
            parameter.grad = gradient.to(parameter.device)
        norm = clip_grad_norm_(self._distinct, self._options.clip)
        steps = self._options.epochs * self._ledger.batches
        self._optimizer.param_groups[0]["lr"] = rate(self._steps, steps, self._options)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        return float(norm)

    def error(self, place: int) -> tuple[int, float]:
        """Return a held-out chunk's number of tokens and the sum of their errors."""
        index = self._ledger.held_out[place]
        error = float(self._error(index, self._shard.forward))
        return int(self._inputs[index].mask.sum()), error

    def keep(self) -> None:
        """Record the current state as the best so far."""
        self._best_state = self._state()

    def take_best(self) -> dict[str, Tensor]:
        """Restore the best state in the shard and return it, on the CPU."""
        self._load(self._best_state)
        return {name: tensor.cpu() for name, tensor in self._best_state.items()}

    def digest(self) -> str:
        """BLAKE2b of the trained parameters, equal for all replicas."""
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self._distinct:
            digest.update(parameter.detach().contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def result(self) -> Refined:
        """Restore the best state in the shard and return it with the account of the training."""
        _, account = self.start, self._ledger.account()
        found = {field.name: getattr(account, field.name) for field in fields(Account)}
        return Refined(tensors=self.take_best(), **found)

    @property
    def start(self) -> float:
        """Held-out loss before the first step; evaluated on first use."""
        ledger = self._ledger
        if ledger.start is None:
            ledger.evaluated([self.error(place) for place in range(len(ledger.held_out))])
        assert ledger.start is not None
        return ledger.start

    def _batch(self, epoch: int, batch: int) -> Sequence[int]:
        """Indices of a step's training chunks."""
        generator = self._randomness.block_order(self._shard.blocks.start, epoch)
        training = self._ledger.training
        order = torch.randperm(len(training), generator=generator).tolist()
        return [training[place] for place in divide(order, self._ledger.batches)[batch]]

    def _error(self, index: int, run: Callable[[Chunk], Chunk]) -> Tensor:
        """Sum the squared error over a chunk's tokens, averaged over channels; a scalar tensor."""
        chunk, target = self._inputs[index], self._targets[index]
        if chunk.index != target.index or not torch.equal(chunk.mask, target.mask):
            raise ValueError(f"input {chunk.index} and target {target.index} are different chunks")
        payload = chunk.payload and chunk.payload.map(self._cast)
        found_BTC = _hidden(run(chunk.with_payload(payload)))
        gap_BTC = found_BTC - self._cast(_hidden(target))
        # values at padding are arbitrary, NaN included
        gap_BTC = gap_BTC.where(bring(target.mask, gap_BTC.device)[..., None], 0.0)
        return gap_BTC.square().sum() / gap_BTC.shape[-1]

    def _cast(self, tensor: Tensor) -> Tensor:
        """Transfer a tensor to the shard's device and cast it there to the shard's dtype."""
        brought = bring(tensor, self._shard.device)
        return brought.to(self._dtype) if tensor.is_floating_point() else brought

    def _state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[name])


def merge(parts: Iterable[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """Sum the slices' gradients in order, in place in the first tensor of each position."""
    total: dict[int, Tensor] = {}
    for part in parts:
        for place, gradient in part.items():
            total[place] = total[place].add_(gradient) if place in total else gradient
    return total


def _hidden(chunk: Chunk) -> Tensor:
    """Residual stream of a chunk, [B, T, C]."""
    assert chunk.payload is not None
    return chunk.payload.tensors()[0]


def trained_parameters(shard: Shard, *, dense: bool) -> dict[str, nn.Parameter]:
    """Select the parameters of a shard that refinement trains, by their names in the model."""
    own = shard.own_parameters().items()
    return {name: p for name, p in own if dense or not _is_dense_weight(shard, name)}


def _is_dense_weight(shard: Shard, name: str) -> bool:
    """Test if a parameter is the weight of a plain linear that is not part of a compressed one."""
    path, _, child = name.rpartition(".")
    if child != "weight" or not isinstance(shard.module(path), nn.Linear | Conv1D):
        return False
    return shard.compressed_linear(name) is None
