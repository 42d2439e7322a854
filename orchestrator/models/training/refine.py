"""Refining compressed blocks: their parameters trained to give what the dense blocks give.

Shape suffixes: B sequences, T tokens, C channels.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers.pytorch_utils import Conv1D

from orchestrator.device.strict import strict
from orchestrator.device.transport import CPU, bring
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.refine_ledger import Account, Epoch, Ledger, Stop
from orchestrator.models.training.refine_options import RefineOptions, divide, rate

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined(Account):
    """The best state that training came through, the start included."""

    tensors: Mapping[str, Tensor]
    """Every trained parameter by its name in the model, on the CPU."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a step's gradient."""

    losses: tuple[float, ...]
    """Of its chunks, each divided by the tokens of the whole batch."""
    tokens: int
    """Of the whole batch."""
    gradients: Mapping[int, Tensor]
    """By the parameter's place; one that the chunks do not reach has none."""


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
    from (seed, first block, epoch) alone. A step's batch is divided into slices; each adds up the
    gradients of its chunks one by one in that order, a chunk being the quantum, and the slices are
    added up in theirs. So a result is a function of its arguments and the environment, to the bit,
    and one that was interrupted goes on from a `snapshot` as if it were not. Forward and backward
    run once a step and chunk.

    Replicas: of a block that several workers train each has a refinement of its own. They share out
    the slices (`slice`) and the held-out chunks (`error`), and each makes every step with the
    gradients of all (`merge`, `step`), so that all hold the same bits (`digest`) and none ever
    sends a parameter. `epoch` is the same with one.

    Memory: 24 bytes a trained parameter (value, gradient and that of a slice, two moments, best
    state), 4 a parameter that is not, and the activations of one chunk. An epoch costs about three
    forward passes over the chunks: 3 multiply-adds a parameter and token.

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
        self._ledger = Ledger(len(inputs), options)
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
        # on CUDA one kernel, where the default has several and temporaries of all parameters
        fused = shard.device.type == "cuda" or None
        self._optimizer = torch.optim.AdamW(self._distinct, weight_decay=decay, fused=fused)
        self._made = 0
        self._best_state = self._state()

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
        return self._ledger.stop

    def epoch(self) -> Epoch:
        """Performs the next epoch."""
        ledger, _ = self._ledger, self.start
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
        """One part of the gradient of a step's loss."""
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
        # read together: the host is ahead of the device meanwhile
        values = torch.stack(losses).tolist() if losses else []
        return Slice(tuple(values), tokens, gradients)

    def step(self, gradients: Mapping[int, Tensor]) -> float:
        """The next step, with the merged gradients of its slices; their norm before the clip."""
        for place, gradient in gradients.items():
            parameter = self._distinct[place]
            parameter.grad = gradient.to(parameter.device)
        norm = clip_grad_norm_(self._distinct, self._options.clip)
        steps = self._options.epochs * self._ledger.batches
        self._optimizer.param_groups[0]["lr"] = rate(self._made, steps, self._options)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._made += 1
        return float(norm)

    def error(self, place: int) -> tuple[int, float]:
        """Of one of the held-out chunks its tokens, and the sum of their errors."""
        index = self._ledger.held_out[place]
        error = float(self._error(index, self._shard.forward))
        return int(self._inputs[index].mask.sum()), error

    def keep(self) -> None:
        """The state as it is now is the best so far."""
        self._best_state = self._state()

    def take_best(self) -> dict[str, Tensor]:
        """Puts the best state into the shard and gives it, on the CPU."""
        self._load(self._best_state)
        return {name: tensor.cpu() for name, tensor in self._best_state.items()}

    def digest(self) -> str:
        """BLAKE2b of the trained parameters: the same of all replicas."""
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self._distinct:
            digest.update(parameter.detach().contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def result(self) -> Refined:
        """Puts the best state into the shard and gives it."""
        _, account = self.start, self._ledger.account()
        found = {field.name: getattr(account, field.name) for field in fields(Account)}
        return Refined(tensors=self.take_best(), **found)

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
            "epochs": [asdict(epoch) for epoch in self._ledger.epochs],
            "best": self._ledger.best,
        }
        return {name: tensor.to(CPU, copy=True) for name, tensor in tensors.items()}, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Goes on from a snapshot of a refinement of the same shard, chunks, options and seed."""
        self._ledger.restore(facts)
        self._made = len(self._ledger.epochs) * self._ledger.batches
        names = self._parameters
        self._load({name: tensors[f"value.{name}"] for name in names})
        self._best_state = {name: tensors[f"best.{name}"].to(p.device) for name, p in names.items()}
        for name, parameter in names.items():
            keys = {each: f"{each}.{name}" for each in MOMENTS}
            if tensors.keys() >= set(keys.values()):
                state = {each: tensors[key].to(parameter).clone() for each, key in keys.items()}
                # fused, it is counted on the device, else on the host
                fused = self._optimizer.defaults["fused"]
                step = torch.tensor(float(self._made), device=parameter.device if fused else CPU)
                self._optimizer.state[parameter] = {"step": step, **state}

    @property
    def start(self) -> float:
        """The held-out loss before the first step."""
        ledger = self._ledger
        if ledger.start is None:
            ledger.evaluated([self.error(place) for place in range(len(ledger.held_out))])
        assert ledger.start is not None
        return ledger.start

    def _batch(self, epoch: int, batch: int) -> Sequence[int]:
        """The training chunks of a step."""
        key = json.dumps([self._seed, self._shard.blocks.start, epoch])
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        training = self._ledger.training
        order = torch.randperm(len(training), generator=generator).tolist()
        return [training[place] for place in divide(order, self._ledger.batches)[batch]]

    def _error(self, index: int, run: Callable[[Chunk], Chunk]) -> Tensor:
        """The sum over a chunk's tokens of the squared error, averaged over the channels."""
        chunk, target = self._inputs[index], self._targets[index]
        if chunk.index != target.index or not torch.equal(chunk.mask, target.mask):
            raise ValueError(f"input {chunk.index} and target {target.index} are different chunks")
        payload = chunk.payload and chunk.payload.map(self._cast)
        found_BTC = _hidden(run(chunk.with_payload(payload)))
        gap_BTC = found_BTC - self._cast(_hidden(target))
        # what stands at padding may be anything
        gap_BTC = gap_BTC.where(bring(target.mask, gap_BTC.device)[..., None], 0.0)
        return gap_BTC.square().sum() / gap_BTC.shape[-1]

    def _cast(self, tensor: Tensor) -> Tensor:
        """The tensor on the shard's device, cast there to the shard's dtype."""
        brought = bring(tensor, self._shard.device)
        return brought.to(self._dtype) if tensor.is_floating_point() else brought

    def _state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[name])


def merge(parts: Iterable[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """The sum of slices' gradients in their order, in the memory of the first of each."""
    total: dict[int, Tensor] = {}
    for part in parts:
        for place, gradient in part.items():
            total[place] = total[place].add_(gradient) if place in total else gradient
    return total


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
