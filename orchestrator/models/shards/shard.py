"""A contiguous run of a model's blocks, with its own weights and nothing else in memory.

The model's own forward runs every time: blocks before the shard hand on the payload received
instead of computing, the shard's blocks compute, and the last of them ends the pass and gives
its return value as the payload to send. So masks, position embeddings and whatever else a
family prepares outside its blocks are made by its own code, in every shard, from tokens and mask.

B sequences, T tokens each, V tokens in the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from orchestrator.device.strict import strict
from orchestrator.device.transport import bring
from orchestrator.models.shards.chunk import Chunk, Payload
from orchestrator.models.survey.architecture import recompute_buffers, set_tensor
from orchestrator.plan.linear import Linear


@dataclass(frozen=True, slots=True)
class EmptyModel:
    """What all shards of a lazy model share: the model without weights, ready to run."""

    model: PreTrainedModel
    prefix: str
    blocks: nn.ModuleList
    extras: tuple[str, ...]
    """Block arguments whose contents travel with the payload."""
    device: torch.device


class Shard:
    """Blocks that can be run, forward and backward; made by `LazyModel.shard`.

    One call at a time. A shard computes bit for bit what the whole model computes with the same
    dtype, attention implementation, number of threads, and shape of the chunk.
    """

    def __init__(
        self,
        frame: EmptyModel,
        blocks: range,
        sources: Mapping[str, str],
        linears: tuple[Linear, ...],
        load: Callable[[str], Tensor],
    ) -> None:
        """Args beyond the attributes: for every tensor to load the stored one, and its reader."""
        self.blocks = blocks
        self.linears = linears
        """The linears of the shard's blocks in survey order; none if the model is compressed."""
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == len(frame.blocks)
        self.is_open = True
        self.on_output: Callable[[Tensor], None] | None = None
        """Told of the hidden states that the last block gives, in every pass, forward or back."""
        self._frame = frame
        self._received: Payload | None = None
        self._cache: Cache | None = None
        self._size = torch.Size((0, 0))
        self._ends_at_last_block = True
        self._part = blocks
        self._load_one, self._sources = load, sources
        self._is_frozen = self._lacks_ends = False
        self._replaced: list[tuple[str, Tensor]] = []
        try:
            self._recompute_buffers()
            self._load(sources)
            for index, block in enumerate(frame.blocks):
                block.forward = partial(self._visit, index, block.forward)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the shard's weights; the lazy model can then open another."""
        if not self.is_open:
            return
        self.is_open = False
        for block in self._frame.blocks:
            vars(block).pop("forward", None)
        for name, tensor in reversed(self._replaced):
            set_tensor(self._frame.model, name, tensor)
        self._replaced.clear()

    def forward(self, chunk: Chunk, cache: Cache | None = None, part: range | None = None) -> Chunk:
        """The chunk with the state after the shard's last block, on the shard's device.

        The chunk given is not changed. No gradients are recorded; forward hooks on `module`s
        fire as usual.

        Args:
            cache: Keys and values of the tokens before the chunk, to which its own are added;
                the chunk then has no padding.
            part: Contiguous blocks of the shard to run, the chunk being at their input; nothing
                runs all of them. The state is then the one after the last of these.
        """
        with torch.no_grad(), self._limited_to(part):
            received = self._copy(chunk.payload)
            return chunk.with_payload(self._payload(chunk, received, cache))

    def logits(self, chunk: Chunk, cache: Cache | None = None, part: range | None = None) -> Tensor:
        """The model's logits [B, T, V] for a chunk at the shard's input; last shard only.

        Args:
            cache, part: As for `forward`; a part goes to the shard's last block.
        """
        with torch.no_grad(), self._limited_to(part):
            return self._logits(chunk, self._copy(chunk.payload), cache)

    @strict()
    def trace(self, chunk: Chunk) -> Chunk:
        """As `forward`, recorded by autograd for the parameters that require gradients.

        For a loss on the state after the last block: one pass forward and one back. Nothing goes
        back into the chunk given. The backward pass is the caller's, inside `strict`.
        """
        with torch.enable_grad():
            return chunk.with_payload(self._payload(chunk, self._copy(chunk.payload)))

    @strict()
    def backward(
        self,
        chunk: Chunk,
        grads: Sequence[Tensor | None] | Callable[[Tensor], Tensor],
        part: range | None = None,
    ) -> list[Tensor | None]:
        """Runs the shard again, with gradients, and goes back through it, both inside `strict`.

        Gradients of the shard's parameters are added to their `.grad`, unless they require none
        (`freeze`). A tied parameter that the first and the last shard both hold has in each the
        part of its gradient that arises there.

        Args:
            chunk: At the shard's input.
            grads: Of the loss, by the tensors of the payload that `forward` gives
                (`Payload.tensors`), or, on the last shard, by the logits alone; there it may be
                what makes the gradient out of the logits [B, T, V].
            part: As for `forward`; what is said of the shard is then true of these blocks.

        Returns:
            Gradients by the tensors of the chunk's payload; empty on the first shard.
        """
        received = self._copy(chunk.payload)
        leaves = received.tensors() if received else []
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
        with torch.enable_grad(), self._limited_to(part):
            if self._part.stop == len(self._frame.blocks):
                outputs = [self._logits(chunk, received)]
            else:
                outputs = self._payload(chunk, received).tensors()
        if callable(grads):
            (logits_BTV,) = outputs
            grads = [grads(logits_BTV.detach())]
        pairs = zip(outputs, grads, strict=True)
        wanted = [(out, grad) for out, grad in pairs if grad is not None and out.requires_grad]
        torch.autograd.backward(
            [out for out, _ in wanted], [bring(grad, self.device) for _, grad in wanted]
        )
        return [leaf.grad for leaf in leaves]

    def free_ends(self) -> None:
        """Frees what lies outside of its blocks (embeddings, head); the next pass loads it again.

        For the time in which only the weights of the blocks are needed.
        """
        outer = [(name, old) for name, old in self._replaced if not self._is_inside(name)]
        for name, stand_in in reversed(outer):
            set_tensor(self._frame.model, name, stand_in)
        self._replaced = [each for each in self._replaced if self._is_inside(each[0])]
        self._lacks_ends |= bool(outer)

    def _take_up_ends(self) -> None:
        if self._lacks_ends:
            self._load({n: s for n, s in self._sources.items() if not self._is_inside(n)})
            self._lacks_ends = False
            if self._is_frozen:
                self.freeze()

    def freeze(self) -> None:
        """From here on no parameter takes a gradient: what goes back is for activations alone."""
        self._is_frozen = True
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Device of the shard's weights and computations."""
        return self._frame.device

    @property
    def config(self) -> PretrainedConfig:
        return self._frame.model.config

    def module(self, name: str) -> nn.Module:
        """The live module of this name in the shard's blocks, for hooks and for its weight."""
        if not self._is_inside(f"{name}."):
            raise ValueError(f"{name} is not in blocks {self.blocks.start} to {self.blocks.stop}")
        module: nn.Module = self._frame.model.get_submodule(name)
        return module

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the shard has loaded, by their names in the model."""
        model = self._frame.model
        names = {name for name, _ in self._replaced}
        parameters = model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in parameters if name in names}

    def block(self, name: str) -> int:
        """Index of the block that a parameter of this name belongs to."""
        return int(name.removeprefix(f"{self._frame.prefix}.").partition(".")[0])

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of its blocks, but for a basis that blocks outside the shard use too."""
        loaded = self.parameters()
        groups: dict[str, set[str]] = {}
        for name, basis in self._frame.model.all_tied_weights_keys.items():
            groups.setdefault(basis, {basis}).add(name)
        shared = {name for group in groups.values() if not group <= loaded.keys() for name in group}
        return {
            name: parameter
            for name, parameter in loaded.items()
            if self._is_inside(name) and name not in shared
        }

    def _is_inside(self, name: str) -> bool:
        """Whether what has this name belongs to one of the shard's blocks."""
        return name.startswith(tuple(f"{self._frame.prefix}.{block}." for block in self.blocks))

    def _visit(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for a block's forward."""
        if index < self._part.start:
            assert self._received is not None
            if self._cache is not None:
                # positions and masks come from the length of the first layer's keys, so there
                # must be some, as many as tokens; one channel of one head will do
                sequences, tokens = self._size
                stand_in = torch.zeros(sequences, 1, tokens, 1, device=self._frame.device)
                self._cache.update(stand_in, stand_in, index)
            return self._received.output
        if index == self._part.start and self._received is not None:
            for name, content in self._received.extras.items():
                kwargs[name].update(content)
        output = forward(*args, **kwargs)
        if index == self.blocks.stop - 1 and self.on_output is not None:
            self.on_output(Payload(output).tensors()[0])
        if index == self._part.stop - 1 and self._ends_at_last_block:
            extras = {name: dict(kwargs[name]) for name in self._frame.extras if name in kwargs}
            raise _LastBlockDone(Payload(output, extras).map(Tensor.contiguous))
        return output

    def _payload(
        self, chunk: Chunk, received: Payload | None, cache: Cache | None = None
    ) -> Payload:
        try:
            self._run(chunk, received, cache, ends_at_last_block=True)
        except _LastBlockDone as done:
            return done.payload
        raise AssertionError("the model did not reach the shard's last block")

    def _logits(self, chunk: Chunk, received: Payload | None, cache: Cache | None = None) -> Tensor:
        if not self.is_last:
            raise ValueError(f"logits need the last block; this shard has blocks {self.blocks}")
        logits_BTV: Tensor = self._run(chunk, received, cache, ends_at_last_block=False).logits
        return logits_BTV

    def _run(
        self,
        chunk: Chunk,
        received: Payload | None,
        cache: Cache | None,
        *,
        ends_at_last_block: bool,
    ) -> Any:
        if not self.is_open:
            raise ValueError(f"the shard of blocks {self.blocks} is closed")
        if (received is None) != (self._part.start == 0):
            place = "no payload" if received is None else "a payload"
            raise ValueError(f"the chunk has {place}, the shard starts at {self._part.start}")
        self._take_up_ends()
        self._received, self._ends_at_last_block = received, ends_at_last_block
        self._cache, self._size = cache, chunk.tokens.shape
        mask = None if cache is not None else bring(chunk.mask, self.device).to(torch.int64)
        try:
            # The mask always: one of ones gives the same bits as none, and all shards agree.
            return self._frame.model(
                input_ids=bring(chunk.tokens, self.device),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                return_dict=True,
            )
        finally:
            self._received = self._cache = None

    @contextmanager
    def _limited_to(self, part: range | None) -> Iterator[None]:
        """Only these of the shard's blocks run."""
        if part is not None:
            within = self.blocks.start <= part.start < part.stop <= self.blocks.stop
            if part.step != 1 or not within:
                raise ValueError(f"{part} is no part of the shard of blocks {self.blocks}")
            self._part = part
        try:
            yield
        finally:
            self._part = self.blocks

    def _copy(self, payload: Payload | None) -> Payload | None:
        # A model may write to its hidden states in place; the caller's chunk stays as it is.
        def copied(tensor: Tensor) -> Tensor:
            found = bring(tensor, self.device)
            return found.clone() if found is tensor else found

        return payload and payload.map(copied)

    def _recompute_buffers(self) -> None:
        frame, modules = self._frame, []
        for index in self.blocks:
            start = f"{frame.prefix}.{index}."
            modules += [m for m in frame.blocks[index].modules() if m._buffers]
            buffers = frame.blocks[index].named_buffers()
            self._replaced += [(start + name, buffer) for name, buffer in buffers]
        if modules:
            recompute_buffers(frame.model, modules, frame.device)

    def _load(self, sources: Mapping[str, str]) -> None:
        loaded: dict[str, Tensor] = {}
        model = self._frame.model
        for name, source in sources.items():
            if source not in loaded:
                tensor = self._load_one(source)
                loaded[source] = nn.Parameter(tensor) if tensor.is_floating_point() else tensor
            parent, _, child = name.rpartition(".")
            module = model.get_submodule(parent)
            is_buffer = child in module._buffers
            old = module._buffers[child] if is_buffer else module._parameters[child]
            assert old is not None
            self._replaced.append((name, old))
            new = loaded[source]
            set_tensor(model, name, new.detach() if is_buffer else new)


class _LastBlockDone(BaseException):
    """Ends a forward pass from inside; not an `Exception`, so that no model's code catches it."""

    def __init__(self, payload: Payload) -> None:
        super().__init__()
        self.payload = payload
