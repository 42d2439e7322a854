"""Model that loads its weights on demand, one shard at a time.

Opening reads the config and the tensor headers and traces the model's structure (`discovery`).
`shard` loads the weights of a few blocks; closing the shard frees them. Workers of several stages
may open the same model one after the other in a process: its structure is traced once.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.layout import (
    TensorSpec,
    dtype_name,
    forms_fields,
    layout,
    stored_forms,
)
from orchestrator.models.checkpoint.planned import PlannedCheckpoint
from orchestrator.models.checkpoint.stored_tensor import Region, StoredTensor
from orchestrator.models.checkpoint.weights import Checkpoint, Weights, first_float_dtype
from orchestrator.models.forms.config import METHOD
from orchestrator.models.shards.dtypes import loaded_dtypes
from orchestrator.models.shards.empty_model import EmptyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.shards.traces import trace_once
from orchestrator.models.survey.architecture import (
    Architecture,
    find_blocks,
    recompute_buffers,
    set_tensor,
)
from orchestrator.models.survey.discovery import Discovery, discover, phantom
from orchestrator.models.survey.expert_weights import view_experts
from orchestrator.models.survey.experts import survey_experts, with_routing
from orchestrator.models.survey.image_models import reads_images
from orchestrator.models.survey.linears import check_parameters
from orchestrator.models.survey.names import Names, map_names
from orchestrator.models.survey.regions import block_of, find_regions, model_sizes
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Plan
from orchestrator.store.places import Place


class LazyModel:
    """Causal language model with at most one shard in memory."""

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
        """Dtype of computations; stored weights are cast to it."""
        self.device = device
        self._architecture = architecture
        traced = architecture.build(dtype, stored=len(weights.names))
        self.attention: str = traced.config._attn_implementation
        """Attention implementation, `sdpa` or `eager`."""
        self.prefix, blocks = find_blocks(traced, self.directory)
        """Module name of the list of blocks, `model.layers`."""
        self.num_blocks = len(blocks)
        if not self.is_compressed:
            for index, block in enumerate(blocks):
                check_parameters(str(self.directory), f"{self.prefix}.{index}", block)
        self._experts = survey_experts(traced, self.prefix)
        self.names: Names = map_names(traced, weights)
        tied = dict(traced.all_tied_weights_keys)
        for name in [name for pair in tied.items() for name in pair]:
            # blocks of a compressed model share only bases, which our forms tie
            if self._block(name) is not None and not self.is_compressed:
                raise InputError(f"{self.directory}: {name} is tied; blocks must not share weights")
        self._parameters: int = sum(
            p.numel() for n, p in traced.named_parameters() if n not in tied
        )
        """Parameters that are not tied to others."""
        self._tied_sizes: dict[str, int] = {
            n: p.numel() for n, p in traced.named_parameters() if n in tied
        }
        self._order = tuple(traced.state_dict())
        self._discovery, is_traced = self._trace(traced, blocks)
        self._linears = with_routing(self._discovery.linears, self._experts)
        self._unused: PreTrainedModel | None = None if is_traced else traced
        """The built model, unless its trace has used it up."""
        self._shard: Shard | None = None

    @classmethod
    def open(
        cls,
        directory: Place,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> "LazyModel":
        """Open the checkpoint in `directory`, dense or compressed by orchestrator.

        Args:
            dtype: Dtype of computations; None: the config's, else the first stored float tensor's.
            device: Device on which shards are loaded and run; None: the CPU.

        Raises:
            InputError: The checkpoint is damaged or not supported; the message names the cause.
        """
        stored = Weights.open(directory)
        architecture = Architecture.read(directory)
        weights = view_experts(stored, architecture)
        if dtype is None:
            named = architecture.config.dtype
            dtype = named if isinstance(named, torch.dtype) else first_float_dtype(weights)
        return cls(architecture, weights, dtype=dtype, device=device or torch.device("cpu"))

    def planned(
        self,
        plan: Plan,
        read: Callable[[TensorSpec], Tensor],
        *,
        output_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LazyModel":
        """Open the compressed checkpoint that a plan produces from this dense model, unwritten.

        Its shards compute the same as those of the written checkpoint: the modules are the plan's
        forms, the values are cast to the output dtype. No tensor is read before a shard is opened.

        Args:
            read: Returns every tensor, copies included, as for `checkpoint.write_file`.
            output_dtype: As for `layout`; float32 rounds no value.
            dtype: Dtype of computations; None: this lazy model's.

        Raises:
            InputError: This checkpoint is already compressed.
            ValueError: The plan does not fit the model.
        """
        survey = self.survey()
        files = layout(
            survey,
            self.tensors(),
            plan,
            output_dtype=output_dtype,
            max_shard_bytes=sys.maxsize,
            splits_experts=True,
        )
        forms = {"quant_method": METHOD, **forms_fields(survey, stored_forms(survey, plan))}
        return LazyModel(
            replace(self._architecture, forms=forms),
            PlannedCheckpoint(self.weights, files, read),
            dtype=dtype or self.dtype,
            device=self.device,
        )

    def _trace(self, traced: PreTrainedModel, blocks: nn.ModuleList) -> tuple[Discovery, bool]:
        """Trace the structure, unless this process has traced an equal one; True if it has not."""
        key = (
            type(traced),
            traced.config.to_json_string(use_diff=False),
            json.dumps(self._architecture.forms, sort_keys=True),
            self.attention,
            self.dtype,
        )
        where, is_dense = str(self.directory), not self.is_compressed
        return trace_once(
            key, lambda: discover(traced, self.prefix, blocks, where=where, is_dense=is_dense)
        )

    @property
    def config(self) -> PretrainedConfig:
        return self._architecture.config

    @cached_property
    def separate(self) -> frozenset[str]:
        """Parameters that the class ties to another one, but that are stored with other values.

        Both tensors are read once, up to a difference; transformers does not tie them either.
        """
        disk, doubled = self.names.disk, self.names.doubled
        return frozenset(
            name
            for name, source in doubled.items()
            if not self.weights.are_equal(disk[name], disk[source])
        )

    @property
    def total_parameters(self) -> int:
        """Number of distinct parameters; tied ones count once, unless stored values differ."""
        tied = self._tied_sizes.items()
        return self._parameters + sum(count for name, count in tied if name in self.separate)

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence by the config; None if it does not say."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def is_compressed(self) -> bool:
        """True for a checkpoint compressed by orchestrator."""
        return self._architecture.forms is not None

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the dense model that was compressed; None if it is not known."""
        found = (self._architecture.forms or {}).get("base_fingerprint")
        return found if isinstance(found, str) else None

    @property
    def disk_names(self) -> Mapping[str, str]:
        """Name on disk of every stored tensor, by its name in the model, in model order."""
        return self.names.disk

    @property
    def front_names(self) -> tuple[str, ...]:
        """Names of the tensors that the first block's input depends on."""
        return self._discovery.front

    @property
    def tail_names(self) -> tuple[str, ...]:
        """Names of the tensors that the logits depend on, given the last block's output."""
        return self._discovery.tail

    def block_names(self, block: int) -> tuple[str, ...]:
        """Names of a block's tensors (parameters and persistent buffers), in model order."""
        start = f"{self.prefix}.{block}."
        return tuple(name for name in self._order if name.startswith(start))

    def tensors(self) -> tuple[StoredTensor, ...]:
        """All stored tensors: those of the front, then block by block, then those of the tail.

        Each group is in model order. Tensors not used for text (a vision tower) belong to the
        front if they precede the blocks, else to the tail.
        """
        regions = find_regions(self._order, self.prefix, self._discovery)
        parts: dict[Region, list[StoredTensor]] = {"front": [], "block": [], "tail": []}
        for name in self._order:
            if name not in self.names.disk:
                continue
            disk_name, (place, block) = self.names.disk[name], regions[name]
            parts[place].append(
                StoredTensor(
                    name=name,
                    disk_name=disk_name,
                    shape=self.weights.shape(disk_name),
                    dtype=dtype_name(self.weights.dtype(disk_name)),
                    block=block,
                    place=place,
                    fused=self.weights.origin(disk_name),
                )
            )
        return (*parts["front"], *parts["block"], *parts["tail"])

    def survey(self) -> Survey:
        """Survey the dense checkpoint from config and headers; no weight is read.

        Raises:
            InputError: The checkpoint is already compressed, or no block has a linear.
        """
        if self.is_compressed:
            raise InputError(
                f"{self.directory}: already compressed by orchestrator; a dense checkpoint is "
                "needed (export --format dense makes one)"
            )
        linears = self._linears
        if not linears:
            raise InputError(f"{self.directory}: no block has a linear")
        return Survey(
            fingerprint=self.weights.fingerprint,
            architecture=self._architecture.model_class.__name__,
            config_class=self._architecture.model_class.config_class.__name__,
            model_type=self.config.model_type,
            dtype=dtype_name(self.weights.dtype(self.names.disk[f"{linears[0].name}.weight"])),
            num_blocks=self.num_blocks,
            linears=linears,
            total_parameters=self.total_parameters,
            sizes=model_sizes(
                ((each.place, each.block, math.prod(each.shape)) for each in self.tensors()),
                self.config,
            ),
            unused=self.names.unused,
            experts=self._experts,
            has_own_head=bool(self.separate) and not self.names.tied,
            reads_images=reads_images(self._architecture.model_class.__name__),
        )

    def shard(self, blocks: range) -> Shard:
        """Load the tensors needed to run `blocks`, and no others.

        These are the blocks' own tensors, the front's for the first block, the tail's for the
        last, and those that the blocks' arguments depend on; the vision tower's for the first block
        once a chunk has images. Close a shard before opening another.

        Raises:
            InputError: A tensor cannot be read, or has NaN or infinite values.
            ValueError: Another shard is open, or `blocks` is not a contiguous range of blocks.
        """
        if self._shard is not None and self._shard.is_open:
            raise ValueError(f"blocks {self._shard.blocks} are still open; close them first")
        if blocks.step != 1 or not 0 <= blocks.start < blocks.stop <= self.num_blocks:
            raise ValueError(f"{blocks} is not a contiguous range of {self.num_blocks} blocks")
        names = list(self._discovery.arguments)
        if blocks.start == 0 or self._discovery.arguments:
            names += self.front_names
        for block in blocks:
            names += self.block_names(block)
        if blocks.stop == self.num_blocks:
            names += self.tail_names
        linears = tuple(x for x in self._linears if x.block in blocks)
        text = {*self.front_names, *self.tail_names, *self._discovery.arguments}
        beside = [n for n in self._order if self._block(n) is None and n not in text]
        self._shard = Shard(
            self._empty_model,
            blocks,
            sources=self._sources(names),
            for_images=self._sources(beside if blocks.start == 0 else []),
            linears=linears,
            load=self.load,
        )
        return self._shard

    def _sources(self, names: Iterable[str]) -> dict[str, str]:
        """Name of the stored tensor of each of these tensors that is stored."""
        sources = {name: self.names.tied.get(name, name) for name in names}
        return {name: source for name, source in sources.items() if source in self.names.disk}

    def read_ahead(self, blocks: range) -> None:
        """Ask the system to prefetch the blocks' own tensors into its page cache."""
        names = [name for block in blocks for name in self.block_names(block)]
        sources = {self.names.tied.get(name, name) for name in names}
        self.weights.read_ahead([self.names.disk[s] for s in sources if s in self.names.disk])

    @cached_property
    def _empty_model(self) -> EmptyModel:
        """The model that shards load their weights into; made when the first is opened."""
        model, self._unused = self._unused, None
        if model is None:
            model = self._architecture.build(self.dtype, stored=len(self.weights.names))
        prefix, blocks = find_blocks(model, self.directory)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if self._block(name) is None:
                placeholder = phantom(parameter, self.device, requires_grad=False)
                set_tensor(model, name, placeholder)
        inner = {id(module) for module in blocks.modules()}
        outer = [module for module in model.modules() if id(module) not in inner]
        recompute_buffers(model, outer, self.device)
        return EmptyModel(model, prefix, blocks, self._discovery.extras, self.device)

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """Dtype to which each tensor of the model is cast when it is loaded."""
        return loaded_dtypes(self._empty_model.model, self.dtype)

    def _block(self, name: str) -> int | None:
        """Index of the block that contains a tensor; None outside the blocks."""
        return block_of(name, self.prefix)

    def load(self, name: str) -> Tensor:
        """Load a tensor by its name in the model; checks and casts it on the device.

        During a cast the device holds both tensors, even if the dtype is narrower than the stored
        one: a cast on the host takes longer than copying twice the bytes.

        Raises:
            InputError: The tensor cannot be read, or has NaN or infinite values.
        """
        disk_name = self.names.disk[name]
        tensor = self.weights.read(disk_name, self.device)
        if tensor.is_floating_point() and tensor.numel():
            bounds = torch.stack(torch.aminmax(tensor))  # one pass; NaN propagates to both
            if not bool(bounds.isfinite().all()):
                nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
                raise InputError(
                    f"{self.directory}: {disk_name} has {nan} NaN and {infinite} infinite of "
                    f"{tensor.numel()} values; the checkpoint is damaged"
                )
        return tensor.to(self._dtypes[name])
