"""Shard of a model: a contiguous range of blocks with only their weights in memory.

Every pass runs the model's own forward: blocks before the shard return the received state instead
of computing, the shard's blocks compute, and the last of them ends the pass with its return value
as the new state. Masks, position embeddings and anything else that a family prepares outside its
blocks are therefore computed by its own code, in every shard, from tokens and mask.

Shape suffixes: B sequences, T tokens each, V tokens in the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

from orchestrator.device.strict import strict
from orchestrator.device.transport import bring
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.shards.chunk import BlockState, Chunk
from orchestrator.models.shards.empty_model import EmptyModel
from orchestrator.models.shards.image_features import ImageFeatures
from orchestrator.models.survey.architecture import recompute_buffers, set_tensor
from orchestrator.plan.linear import Linear


class Shard:
    """Blocks that run forward and backward; created by `LazyModel.shard`.

    Not thread-safe. Results are bit for bit those of the whole model with the same dtype,
    attention implementation, number of threads, and chunk shape.

    Args:
        empty: The model that the weights are loaded into.
        sources: Name of the stored tensor of each tensor to load.
        for_images: The same of those to load once a chunk has images.
        load: Reads a stored tensor.
    """

    def __init__(
        self,
        empty: EmptyModel,
        blocks: range,
        *,
        sources: Mapping[str, str],
        for_images: Mapping[str, str],
        linears: tuple[Linear, ...],
        load: Callable[[str], Tensor],
    ) -> None:
        self.blocks = blocks
        self.linears = linears
        """Linears of the shard's blocks in survey order; empty if the model is compressed."""
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == len(empty.blocks)
        self.is_open = True
        self.on_output: Callable[[Tensor], None] | None = None
        """Called with the last block's hidden states in every pass, forward or backward."""
        self._empty = empty
        self._received: BlockState | None = None
        self._cache: Cache | None = None
        self._size = torch.Size((0, 0))
        self._ends_at_last_block = True
        self._part = blocks
        self._load_one, self._sources, self._for_images = load, sources, for_images
        self._images = ImageFeatures(empty.model, self._load_for_images)
        self._is_frozen = self._lacks_ends = False
        self._replaced: list[tuple[str, Tensor]] = []
        self._stood_in: list[nn.Module] = []
        try:
            self._recompute_buffers()
            self._load(sources)
            for index, block in enumerate(empty.blocks):
                self.run_as(block, partial(self._visit, index, block.forward))
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
        """Free the shard's weights; the lazy model can then open another shard."""
        if not self.is_open:
            return
        self.is_open = False
        for module in self._stood_in:
            vars(module).pop("forward", None)
        for name, tensor in reversed(self._replaced):
            set_tensor(self._empty.model, name, tensor)
        self._replaced.clear()

    def forward(self, chunk: Chunk, cache: Cache | None = None, part: range | None = None) -> Chunk:
        """Run the shard; returns the chunk with the state after its last block, on its device.

        The given chunk is not changed. No gradients are recorded; forward hooks on modules fire as
        usual.

        Args:
            cache: Keys and values of the preceding tokens, to which the chunk's are appended; the
                chunk must not have padding.
            part: Contiguous blocks of the shard to run, with the chunk at their input; None: all
                of them. The returned state is then the one after the last of these blocks.
        """
        with torch.no_grad(), self._limited_to(part):
            received = self._copy(chunk.payload)
            return self._images.passed(chunk, self._state(chunk, received, cache), self._part.stop)

    def logits(self, chunk: Chunk, cache: Cache | None = None, part: range | None = None) -> Tensor:
        """Compute the model's logits [B, T, V] for a chunk at the shard's input; last shard only.

        Args:
            cache, part: As for `forward`; a part must end with the shard's last block.
        """
        with torch.no_grad(), self._limited_to(part):
            return self._logits(chunk, self._copy(chunk.payload), cache)

    @strict()
    def trace(self, chunk: Chunk) -> Chunk:
        """Run `forward` recorded by autograd, for the parameters that require gradients.

        For a loss on the state after the last block: one forward and one backward pass. No
        gradient flows into the given chunk. The caller runs the backward pass, inside `strict`.
        """
        with torch.enable_grad():
            state = self._state(chunk, self._copy(chunk.payload))
            return self._images.passed(chunk, state, self._part.stop)

    @strict()
    def backward(
        self,
        chunk: Chunk,
        grads: Sequence[Tensor | None] | Callable[[Tensor], Tensor],
        part: range | None = None,
    ) -> list[Tensor | None]:
        """Recompute the shard's forward pass with gradients and backpropagate, inside `strict`.

        Gradients of the shard's parameters are added to their `.grad`, unless they require none
        (`freeze`). A tied parameter held by both the first and the last shard gets in each the
        part of its gradient that arises there.

        Args:
            chunk: At the shard's input.
            grads: Gradients of the loss with respect to the tensors of the state returned by
                `forward` (`BlockState.tensors`) or, on the last shard, with respect to the logits
                alone; there it may be a function that computes the gradient from the logits
                [B, T, V].
            part: As for `forward`; statements about the shard then apply to these blocks.

        Returns:
            Gradients with respect to the tensors of the chunk's state; empty on the first shard.
        """
        received = self._copy(chunk.payload)
        leaves = received.tensors() if received else []
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
        with torch.enable_grad(), self._limited_to(part):
            if self._part.stop == len(self._empty.blocks):
                outputs = [self._logits(chunk, received)]
            else:
                outputs = self._state(chunk, received).tensors()
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
        """Free the weights outside the blocks (embeddings, head); the next pass reloads them.

        Used while only the weights of the blocks are needed.
        """
        outer = [(name, old) for name, old in self._replaced if not self._is_inside(name)]
        for name, placeholder in reversed(outer):
            set_tensor(self._empty.model, name, placeholder)
        self._replaced = [each for each in self._replaced if self._is_inside(each[0])]
        self._lacks_ends |= bool(outer)

    def _reload_ends(self) -> None:
        if self._lacks_ends:
            self._load({n: s for n, s in self._sources.items() if not self._is_inside(n)})
            self._lacks_ends = False
            if self._is_frozen:
                self.freeze()

    def run_as(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Run another function in the place of a module's forward until the shard is closed."""
        self._stood_in.append(module)
        vars(module)["forward"] = forward

    def freeze(self) -> None:
        """Disable gradients of all parameters; later passes give activation gradients only."""
        self._is_frozen = True
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Device of the shard's weights and computations."""
        return self._empty.device

    @property
    def config(self) -> PretrainedConfig:
        return self._empty.model.config

    def module(self, name: str) -> nn.Module:
        """Return the loaded module in the shard's blocks, or in the vision tower if it is first."""
        if any(each.startswith(f"{name}.") for each in self._for_images):
            self._load_for_images()
        elif not self._is_inside(f"{name}."):
            raise ValueError(f"{name} is not in blocks {self.blocks.start} to {self.blocks.stop}")
        module: nn.Module = self._empty.model.get_submodule(name)
        return module

    def compressed_linear(self, name: str) -> tuple[str, FormLinear] | None:
        """Find the innermost compressed linear that has a parameter or buffer of the blocks.

        Returns:
            Its name in the model, and the module; None if no compressed linear has it.
        """
        path = name.rpartition(".")[0]
        while self._is_inside(f"{path}."):
            module = self.module(path)
            if isinstance(module, FormLinear):
                return path, module
            path = path.rpartition(".")[0]
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the loaded parameters, by their names in the model."""
        model = self._empty.model
        names = {name for name, _ in self._replaced}
        parameters = model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in parameters if name in names}

    def block(self, name: str) -> int:
        """Index of the block that contains a parameter of this name."""
        return int(name.removeprefix(f"{self._empty.prefix}.").partition(".")[0])

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of its blocks, except a basis shared with blocks outside of it."""
        loaded = self.parameters()
        groups: dict[str, set[str]] = {}
        for name, basis in self._empty.model.all_tied_weights_keys.items():
            groups.setdefault(basis, {basis}).add(name)
        shared = {name for group in groups.values() if not group <= loaded.keys() for name in group}
        inside = {name: each for name, each in loaded.items() if self._is_inside(name)}
        return {name: each for name, each in inside.items() if name not in shared}

    def _is_inside(self, name: str) -> bool:
        """Test if a tensor or module name lies within the shard's blocks."""
        return name.startswith(tuple(f"{self._empty.prefix}.{block}." for block in self.blocks))

    def _visit(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replacement for a block's forward."""
        if index < self._part.start:
            assert self._received is not None
            if self._cache is not None:
                # positions and masks follow from the length of the first layer's keys, so it
                # needs as many keys as tokens; one channel of one head is enough
                sequences, tokens = self._size
                placeholder = torch.zeros(sequences, 1, tokens, 1, device=self._empty.device)
                self._cache.update(placeholder, placeholder, index)
            return self._received.output
        if index == self._part.start and self._received is not None:
            for name, content in self._received.extras.items():
                kwargs[name].update(content)
        output = forward(*args, **kwargs)
        if index == self.blocks.stop - 1 and self.on_output is not None:
            self.on_output(BlockState(output).tensors()[0])
        if index == self._part.stop - 1 and self._ends_at_last_block:
            extras = {name: dict(kwargs[name]) for name in self._empty.extras if name in kwargs}
            raise _LastBlockDone(BlockState(output, extras).map(Tensor.contiguous))
        return output

    def _state(
        self, chunk: Chunk, received: BlockState | None, cache: Cache | None = None
    ) -> BlockState:
        try:
            self._run(chunk, received, cache, ends_at_last_block=True)
        except _LastBlockDone as done:
            return done.state
        raise AssertionError("the model did not reach the shard's last block")

    def _logits(
        self, chunk: Chunk, received: BlockState | None, cache: Cache | None = None
    ) -> Tensor:
        if not self.is_last:
            raise ValueError(f"logits need the last block; this shard has blocks {self.blocks}")
        logits_BTV: Tensor = self._run(chunk, received, cache, ends_at_last_block=False).logits
        return logits_BTV

    def _run(
        self,
        chunk: Chunk,
        received: BlockState | None,
        cache: Cache | None,
        *,
        ends_at_last_block: bool,
    ) -> Any:
        if not self.is_open:
            raise ValueError(f"the shard of blocks {self.blocks} is closed")
        if (received is None) != (self._part.start == 0):
            found = "no state" if received is None else "a state"
            raise ValueError(f"the chunk has {found}, but the shard starts at {self._part.start}")
        self._reload_ends()
        self._received, self._ends_at_last_block = received, ends_at_last_block
        self._cache, self._size = cache, chunk.tokens.shape
        mask = None if cache is not None else bring(chunk.mask, self.device).to(torch.int64)
        try:
            # Always with a mask: one of ones gives the same bits as None, and all shards agree.
            with self._images.inputs(chunk, self.device) as inputs:
                return self._empty.model(
                    input_ids=bring(chunk.tokens, self.device),
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    return_dict=True,
                    **inputs,
                )
        finally:
            self._received = self._cache = None

    @contextmanager
    def _limited_to(self, part: range | None) -> Iterator[None]:
        """Run only these blocks of the shard inside the context."""
        if part is not None:
            within = self.blocks.start <= part.start < part.stop <= self.blocks.stop
            if part.step != 1 or not within:
                raise ValueError(f"{part} is not a contiguous range within blocks {self.blocks}")
            self._part = part
        try:
            yield
        finally:
            self._part = self.blocks

    def _copy(self, state: BlockState | None) -> BlockState | None:
        # A model may write to its hidden states in place; the caller's chunk must not change.
        def copied(tensor: Tensor) -> Tensor:
            found = bring(tensor, self.device)
            return found.clone() if found is tensor else found

        return state and state.map(copied)

    def _recompute_buffers(self) -> None:
        empty, modules = self._empty, []
        for index in self.blocks:
            start = f"{empty.prefix}.{index}."
            modules += [m for m in empty.blocks[index].modules() if m._buffers]
            buffers = empty.blocks[index].named_buffers()
            self._replaced += [(start + name, buffer) for name, buffer in buffers]
        if modules:
            recompute_buffers(empty.model, modules, empty.device)

    def _load_for_images(self) -> None:
        """Load the weights that images need, unless they are loaded; they are never trained."""
        loaded = {name for name, _ in self._replaced}
        if not self._for_images.keys() <= loaded:
            self._load(self._for_images)
            for name, parameter in self.parameters().items():
                if name in self._for_images:
                    parameter.requires_grad_(False)

    def _load(self, sources: Mapping[str, str]) -> None:
        loaded: dict[str, Tensor] = {}
        model = self._empty.model
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
            set_tensor(model, name, loaded[source].detach() if is_buffer else loaded[source])


class _LastBlockDone(BaseException):
    """Ends a forward pass from inside; not an `Exception`, so that no model's code catches it."""

    def __init__(self, state: BlockState) -> None:
        super().__init__()
        self.state = state
