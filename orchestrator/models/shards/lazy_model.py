"""A model without its weights: what it holds, and shards of it on demand.

One lazy model a process and model. Opening reads config and tensor headers and learns the model's
structure (`discovery`); `shard` then puts the weights of a few blocks into it, and closing the
shard takes them out again.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import build_glob_alternation

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.layout import TensorSpec, layout, stored_forms
from orchestrator.models.checkpoint.planned import PlannedCheckpoint
from orchestrator.models.checkpoint.stored_tensor import Region, StoredTensor
from orchestrator.models.checkpoint.weights import Checkpoint, Weights
from orchestrator.models.forms.config import FORMAT_VERSION, METHOD
from orchestrator.models.shards.shard import EmptyModel, Shard
from orchestrator.models.survey.architecture import (
    Architecture,
    find_blocks,
    recompute_buffers,
    set_tensor,
)
from orchestrator.models.survey.discovery import Discovery, discover, phantom
from orchestrator.models.survey.linears import check_parameters
from orchestrator.models.survey.names import Names, map_names
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Plan
from orchestrator.store.places import Place


class LazyModel:
    """A causal language model of which at most one shard is in memory."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.directory = weights.directory
        self.weights = weights
        self.dtype = dtype
        """Dtype of the computation; stored weights are cast to it."""
        self.device = device
        self._architecture = architecture
        throwaway = architecture.build(dtype, stored=len(weights.names))
        self.attention: str = throwaway.config._attn_implementation
        """Implementation of the attention, `sdpa` or `eager`."""
        self.prefix, blocks = find_blocks(throwaway, self.directory)
        """Module name of the list of blocks, `model.layers`."""
        self.num_blocks = len(blocks)
        if not self.is_compressed:
            for index, block in enumerate(blocks):
                check_parameters(str(self.directory), f"{self.prefix}.{index}", block)
        self.names: Names = map_names(throwaway, weights)
        tied = dict(throwaway.all_tied_weights_keys)
        for name in [name for pair in tied.items() for name in pair]:
            # a compressed model's blocks share what our forms tie, and nothing else
            if self._block(name) is not None and not self.is_compressed:
                raise InputError(f"{self.directory}: {name} is tied; blocks must not share weights")
        self.total_parameters = sum(
            p.numel() for name, p in throwaway.named_parameters() if name not in tied
        )
        self._order = tuple(throwaway.state_dict())
        self._discovery: Discovery = discover(
            throwaway,
            self.prefix,
            blocks,
            where=str(self.directory),
            is_dense=not self.is_compressed,
        )
        self._shard: Shard | None = None

    @classmethod
    def open(
        cls,
        directory: Place,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> "LazyModel":
        """The lazy model of the checkpoint in `directory`, dense or compressed by us.

        Args:
            dtype: Dtype to compute in; None: the config's, else the first stored float tensor's.
            device: Where shards are loaded and run; None: the CPU.

        Raises:
            InputError: the checkpoint is damaged or not supported; the line says what was found.
        """
        weights = Weights.open(directory)
        architecture = Architecture.read(directory)
        if dtype is None:
            dtype = _stored_dtype(architecture.config, weights)
        return cls(architecture, weights, dtype=dtype, device=device or torch.device("cpu"))

    def planned(
        self,
        plan: Plan,
        read: Callable[[TensorSpec], Tensor],
        *,
        output_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LazyModel":
        """The checkpoint that a plan makes of this dense one, before it is written.

        Its shards compute what those of the written checkpoint would: the modules are the plan's
        forms, the values cast to the dtype of the output. Nothing is read before a shard is opened.

        Args:
            read: Gives every tensor, copies included: what `checkpoint.write_file` would be given.
            output_dtype: As for `layout`; float32 rounds nothing.
            dtype: Dtype to compute in; None: this lazy model's.

        Raises:
            InputError: this is a checkpoint that we compressed.
            ValueError: the plan does not fit the model.
        """
        survey = self.survey()
        files = layout(
            survey, self.tensors(), plan, output_dtype=output_dtype, max_shard_bytes=sys.maxsize
        )
        modules = {name: form.to_json() for name, form in stored_forms(survey, plan).items()}
        forms = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": modules}
        return LazyModel(
            replace(self._architecture, forms=forms),
            PlannedCheckpoint(self.weights, files, read),
            dtype=dtype or self.dtype,
            device=self.device,
        )

    @property
    def config(self) -> PretrainedConfig:
        return self._architecture.config

    @property
    def is_compressed(self) -> bool:
        """Whether this is a checkpoint that we compressed."""
        return self._architecture.forms is not None

    @property
    def disk_names(self) -> Mapping[str, str]:
        """Name on disk of every tensor of the model that is stored, in model order."""
        return self.names.disk

    @property
    def front_names(self) -> tuple[str, ...]:
        """Names of the tensors that the first block's input is computed from."""
        return self._discovery.front

    @property
    def tail_names(self) -> tuple[str, ...]:
        """Names of the tensors that the logits are computed from, after the last block."""
        return self._discovery.tail

    def block_names(self, block: int) -> tuple[str, ...]:
        """Names of a block's tensors (parameters and persistent buffers), in model order."""
        start = f"{self.prefix}.{block}."
        return tuple(name for name in self._order if name.startswith(start))

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Every stored tensor once: the front's, then block by block, then the tail's.

        Within these they are in model order. What text never needs (a vision tower) counts to
        the front if it stands before the blocks, else to the tail.
        """
        first_block = min(i for i, name in enumerate(self._order) if self._block(name) is not None)
        tail = set(self.tail_names) - set(self.front_names)
        parts: dict[Region, list[StoredTensor]] = {"front": [], "block": [], "tail": []}
        for position, name in enumerate(self._order):
            if name not in self.names.disk:
                continue
            disk_name, block = self.names.disk[name], self._block(name)
            place: Region = "block"
            if block is None:
                is_front = name in self.front_names or (name not in tail and position < first_block)
                place = "front" if is_front else "tail"
            parts[place].append(
                StoredTensor(
                    name=name,
                    disk_name=disk_name,
                    shape=self.weights.shape(disk_name),
                    dtype=_dtype_name(self.weights.dtype(disk_name)),
                    block=block,
                    place=place,
                )
            )
        return (*parts["front"], *parts["block"], *parts["tail"])

    def survey(self) -> Survey:
        """What the dense checkpoint holds; from config and headers, no weight is read.

        Raises:
            InputError: it is a checkpoint that we compressed.
        """
        if self.is_compressed:
            raise InputError(
                f"{self.directory}: already compressed by orchestrator; a dense checkpoint is "
                "needed (export --format dense makes one)"
            )
        linears = self._discovery.linears
        if not linears:
            raise InputError(f"{self.directory}: no block holds a linear")
        return Survey(
            fingerprint=self.weights.fingerprint,
            architecture=self._architecture.model_class.__name__,
            model_type=self.config.model_type,
            dtype=_dtype_name(self.weights.dtype(self.names.disk[f"{linears[0].name}.weight"])),
            num_blocks=self.num_blocks,
            linears=linears,
            total_parameters=self.total_parameters,
        )

    def shard(self, blocks: range) -> Shard:
        """Loads the tensors that running `blocks` takes, and no others.

        These are the blocks' own, the front's for the first block, the tail's for the last, and
        those that the blocks' arguments are computed from. Close the shard before the next.

        Raises:
            InputError: a tensor cannot be read, or has NaN or infinite values.
            ValueError: another shard is open, or `blocks` is no contiguous part of the model.
        """
        if self._shard is not None and self._shard.is_open:
            raise ValueError(f"blocks {self._shard.blocks} are still open; close them first")
        if blocks.step != 1 or not 0 <= blocks.start < blocks.stop <= self.num_blocks:
            raise ValueError(f"{blocks} is no part of {self.num_blocks} blocks")
        names = list(self._discovery.arguments)
        if blocks.start == 0 or self._discovery.arguments:
            names += self.front_names
        for block in blocks:
            names += self.block_names(block)
        if blocks.stop == self.num_blocks:
            names += self.tail_names
        linears = tuple(x for x in self._discovery.linears if x.block in blocks)
        sources = {name: self.names.tied.get(name, name) for name in names}
        sources = {name: source for name, source in sources.items() if source in self.names.disk}
        self._shard = Shard(self._frame, blocks, sources, linears, self.load)
        return self._shard

    def read_ahead(self, blocks: range) -> None:
        """Asks the system to read blocks' own tensors into its cache; nothing is held here."""
        names = [name for block in blocks for name in self.block_names(block)]
        sources = {self.names.tied.get(name, name) for name in names}
        self.weights.read_ahead([self.names.disk[s] for s in sources if s in self.names.disk])

    @cached_property
    def _frame(self) -> EmptyModel:
        """The model that shards are put into; made when the first one is opened."""
        model = self._architecture.build(self.dtype, stored=len(self.weights.names))
        prefix, blocks = find_blocks(model, self.directory)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if self._block(name) is None:
                stand_in = phantom(parameter, self.device, requires_grad=False)
                set_tensor(model, name, stand_in)
        inner = {id(module) for module in blocks.modules()}
        outer = [module for module in model.modules() if id(module) not in inner]
        recompute_buffers(model, outer, self.device)
        return EmptyModel(model, prefix, blocks, self._discovery.extras, self.device)

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """Dtype that every tensor of the model is cast to when it is loaded."""
        model = self._frame.model
        kept, dtype_by_group = None, {}
        if plan := model._get_dtype_plan(self.dtype):
            kept, dtype_by_group, _ = build_glob_alternation(list(plan))
        dtypes = {}
        for name, tensor in model.state_dict().items():
            match = kept.search(name) if kept else None
            dtypes[name] = plan[dtype_by_group[match.lastgroup]] if match else tensor.dtype
        return dtypes

    def _block(self, name: str) -> int | None:
        """Index of the block that a tensor of this name belongs to; None if to none."""
        start = f"{self.prefix}."
        return int(name[len(start) :].split(".")[0]) if name.startswith(start) else None

    def load(self, name: str) -> Tensor:
        """The stored tensor of this module name, on the device, checked and cast there.

        During a cast the device holds both tensors, also if the dtype is narrower than the stored
        one: a cast on the host takes longer than copying twice the bytes.
        """
        disk_name = self.names.disk[name]
        tensor = self.weights.read(disk_name, self.device)
        if tensor.is_floating_point() and tensor.numel():
            bounds = torch.stack(torch.aminmax(tensor))  # one pass; NaN wins in both
            if not bool(bounds.isfinite().all()):
                nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
                raise InputError(
                    f"{self.directory}: {disk_name} has {nan} NaN and {infinite} infinite of "
                    f"{tensor.numel()} values; the checkpoint is damaged"
                )
        return tensor.to(self._dtypes[name])


def _stored_dtype(config: PretrainedConfig, weights: Weights) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for name in weights.names:
        if weights.dtype(name).is_floating_point:
            return weights.dtype(name)
    raise InputError(f"{weights.directory}: no stored tensor is of floating point")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
