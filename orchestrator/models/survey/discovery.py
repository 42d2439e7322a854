"""Trace of one forward pass of a model, from its structure, without reading weights.

The pass runs over a temporary model. Modules outside the blocks run on placeholder parameters
that take no memory; the blocks and everything after them run on the meta device, which computes
only shapes. The trace shows which parameters the input, the output and the blocks' arguments
depend on, in which order a block calls its linears, and which linears read the same input.
"""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orchestrator.errors import InputError
from orchestrator.models.survey.architecture import (
    brief,
    mark_initialized,
    recompute_buffers,
    set_tensor,
)
from orchestrator.models.survey.image_models import reads_images
from orchestrator.models.survey.linears import LinearCalls
from orchestrator.models.survey.repeats import repeat_linears
from orchestrator.models.survey.trees import map_tensors
from orchestrator.plan.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """Names of the tensors outside the blocks, grouped by use, and linears inside the blocks."""

    front: tuple[str, ...]
    """Tensors that the first block's input is computed from, in model order."""
    tail: tuple[str, ...]
    """Tensors that the logits are computed from, given the last block's output."""
    arguments: tuple[str, ...]
    """Tensors that the blocks' other arguments are computed from; empty in most families."""
    extras: tuple[str, ...]
    """Names of block arguments that are mappings which blocks write to."""
    linears: tuple[Linear, ...]
    """All linears, in block order and, within a block, in call order."""


def discover(
    model: PreTrainedModel,
    prefix: str,
    blocks: nn.ModuleList,
    *,
    where: str,
    is_dense: bool,
    first: Sequence[int] = (),
) -> Discovery:
    """Trace one forward pass. The model must be on the meta device and cannot be used afterwards.

    Linears are recorded only if `is_dense`; a compressed checkpoint has `is_dense=False`.

    Args:
        first: For every block the first one that is built equally (`repeats.find_repeats`). Only
            that one runs; the others take over its outputs and linears. Empty: all run.

    Raises:
        InputError: The model does not run each block once and in order, does not return logits,
            or does not call every linear of a block exactly once.
    """
    trace = _Trace(model, prefix, blocks, where=where, is_dense=is_dense, first=first)
    try:
        return trace.run()
    except InputError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise InputError(
            f"{where}: {type(model).__name__} cannot be run block by block: {brief(error)}"
        ) from error


def phantom(like: Tensor, device: torch.device, *, requires_grad: bool) -> nn.Parameter:
    """Create a placeholder parameter: zeros of the same shape and dtype that store one value."""
    zero = torch.zeros((), dtype=like.dtype, device=device)
    parameter = nn.Parameter(zero.expand(like.shape), requires_grad=requires_grad)
    mark_initialized(parameter)
    return parameter


class _Trace:
    """State of the traced pass: its position and its observations."""

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: str,
        blocks: nn.ModuleList,
        *,
        where: str,
        is_dense: bool,
        first: Sequence[int],
    ) -> None:
        self.model, self.prefix, self.blocks = model, prefix, blocks
        self.where, self.is_dense = where, is_dense
        self.first = first or range(len(blocks))
        self.outputs: dict[int, Any] = {}
        """Outputs on the meta device of the blocks that ran, without values."""
        self.outer = [name for name in model.state_dict() if not name.startswith(f"{prefix}.")]
        self.owners: dict[int, str] = {}
        """Name of every placeholder parameter, by its id."""
        self.called: set[str] = set()
        """Tensors owned by the outer modules called since the last block (or the start)."""
        self.order: list[int] = []
        self.front: set[str] = set()
        self.arguments: set[str] = set()
        self.extras: set[str] = set()
        self.linears: dict[int, list[Linear]] = {}
        """Linears by block."""

    def run(self) -> Discovery:
        inner = {id(module) for module in self.blocks.modules()}
        modules = {n: m for n, m in self.model.named_modules() if id(m) not in inner}
        self._replace_outer(partial(phantom, device=torch.device("cpu"), requires_grad=True))
        recompute_buffers(self.model, modules.values(), torch.device("cpu"))
        for name, module in modules.items():
            own = {f"{name}.{key}".lstrip(".") for key in [*module._parameters, *module._buffers]}
            module.register_forward_pre_hook(partial(self._record_call, own))
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._visit, index, block.forward)
        tokens_BT = torch.ones(2, 4, dtype=torch.int64)
        with torch.enable_grad():
            output = self.model(
                input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=False
            )
        if self.order != list(range(len(self.blocks))):
            self._check_skipped()
            raise InputError(
                f"{self.where}: {type(self.model).__name__} calls its {len(self.blocks)} blocks "
                f"in the order {self.order[:20]}; each must be called once, in order"
            )
        logits_BTV = getattr(output, "logits", None)
        if not isinstance(logits_BTV, Tensor) or logits_BTV.shape[:-1] != (2, 4):
            raise InputError(
                f"{self.where}: {type(self.model).__name__} does not return logits for every "
                "token; a causal language model is needed"
            )
        tail = self._reached([logits_BTV]) | self.called
        return Discovery(
            front=self._ordered(self.front),
            tail=self._ordered(tail),
            arguments=self._ordered(self.arguments),
            extras=tuple(sorted(self.extras)),
            linears=tuple(linear for found in self.linears.values() for linear in found),
        )

    def _check_skipped(self) -> None:
        """Raise InputError if the model skips blocks because its input has no image."""
        skipped = sorted(set(range(len(self.blocks))) - set(self.order))
        name = type(self.model).__name__
        if skipped and reads_images(name):
            raise InputError(
                f"{self.where}: {name} skips block {skipped[0]} of {len(self.blocks)} where there "
                "is no image; only models that run all blocks for every input are supported"
            )

    def _replace_outer(self, make: Callable[[Tensor], nn.Parameter]) -> None:
        """Replace every parameter outside the blocks by a placeholder."""
        parameters = dict(self.model.named_parameters())
        self.owners.clear()  # ids of the placeholders before, which other tensors soon have
        for name in self.outer:
            if name in parameters:
                parameter = make(parameters[name])
                set_tensor(self.model, name, parameter)
                self.owners[id(parameter)] = name

    def _record_call(self, own: set[str], module: nn.Module, args: Any) -> None:
        self.called |= own

    def _visit(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replacement for a block's forward."""
        self.order.append(index)
        needed = self._reached([args, kwargs]) | self.called
        self.called = set()
        if index == 0:
            self.front = needed
        else:
            self.arguments |= needed
        keys = {k: set(v) for k, v in kwargs.items() if isinstance(v, MutableMapping)}
        if self.first[index] == index:
            output = self._run_on_meta(index, forward, args=args, kwargs=kwargs)
        else:
            output = self._repeat(index)
        self.extras |= {name for name, before in keys.items() if set(kwargs[name]) != before}
        if not isinstance(output, Tensor | tuple):
            raise InputError(
                f"{self.where}: block {index} returns a {type(output).__name__}; "
                "a tensor or a tuple is supported"
            )
        if index < len(self.blocks) - 1:
            return map_tensors(lambda t: torch.zeros(t.shape, dtype=t.dtype), output)
        # Only shapes matter from here; a product with a placeholder head would copy it.
        self._replace_outer(lambda tensor: nn.Parameter(tensor.detach().to("meta")))
        for name, buffer in list(self.model.named_buffers()):
            set_tensor(self.model, name, buffer.to("meta"))
        return output

    def _run_on_meta(
        self, index: int, forward: Callable[..., Any], *, args: Any, kwargs: Any
    ) -> Any:
        """Run a block on copies of its arguments on the meta device, and record its linears."""
        copies: dict[int, Tensor] = {}

        def to_meta(tensor: Tensor) -> Tensor:
            return copies.setdefault(id(tensor), tensor.detach().to("meta"))

        meta_args, meta_kwargs = map_tensors(to_meta, (args, kwargs))
        calls = LinearCalls(f"{self.prefix}.{index}", self.blocks[index] if self.is_dense else None)
        with torch.no_grad(), calls:
            output = forward(*meta_args, **meta_kwargs)
        self.linears[index] = calls.linears(self.where, index)
        self.outputs[index] = output
        return output

    def _repeat(self, index: int) -> Any:
        """Take over linears and output of an equal block."""
        first = self.first[index]
        self.linears[index] = list(repeat_linears(self.linears[first], self.prefix, index))
        return self.outputs[first]

    def _reached(self, tree: Any) -> set[str]:
        """Names of the placeholders that the tensors in `tree` were computed from."""
        found: set[str] = set()
        seen: set[Any] = set()
        waiting: list[Any] = []

        def visit(tensor: Tensor) -> None:
            if id(tensor) in self.owners:
                found.add(self.owners[id(tensor)])
            waiting.append(tensor.grad_fn)

        map_tensors(visit, tree)
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable") and id(node.variable) in self.owners:
                found.add(self.owners[id(node.variable)])
            waiting += [parent for parent, _ in node.next_functions]
        return found

    def _ordered(self, names: Iterable[str]) -> tuple[str, ...]:
        wanted = set(names)
        return tuple(name for name in self.outer if name in wanted)
