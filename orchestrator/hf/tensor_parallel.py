"""Compressed linears of any form under transformers' tensor parallelism.

A model's plan has one rule for the linears of one name in all blocks: its outputs are split over
the ranks (`colwise`), or its inputs are and the sum is taken (`rowwise`). Compressed, these linears
differ from block to block, so a rule is replaced by one that asks each module what it is:

- the outputs of a low-rank linear are split at `weight`; `down` is whole on every rank;
- the inputs of one, pivoted or not, are split at `down`: the sum over the ranks is R wide, and
  `weight` is whole;
- what has an order of its own, pivoted rows and sparse entries, is whole: a rank computes all
  outputs and keeps its part, or gathers its inputs first.

Each form declares its rule in its module, `FormLinear.split_outputs` and `split_inputs`.

Experts that have linears of their own are whole on every rank, and each rank runs all of them: the
rules for the fused tensors that they replace are dropped. Expert parallelism is refused.

Gradients are those of a single process: where a rank keeps a part, those of all are gathered.
"""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement
from transformers.distributed.parallel_utils import (
    ALL_PARALLEL_STYLES,
    replace_layer_number_by_wildcard,
)
from transformers.distributed.tensor_parallel import ColwiseParallel, TensorParallelLayer

from orchestrator.errors import InputError
from orchestrator.models.experts.module import Experts
from orchestrator.models.forms.base import FormLinear, Split

COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
"""Rules that split outputs, the last two gathering them again."""
ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
"""Rules that split inputs, the last two those that are whole."""
DISPATCH = "ep_dispatch_experts"
"""Rule of expert parallelism that sends tokens to the rank of their expert."""


class _Replicated(TensorParallelLayer):  # type: ignore[misc] # transformers has no types
    """A module with all of its tensors on every rank, between neighbours that are split."""

    def __init__(self, input_layouts: Placement, output_layouts: Placement) -> None:
        self.inputs, self.outputs = input_layouts, output_layouts

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], Any]:
        first, *others = args
        if not isinstance(first, DTensor) and self.inputs != Replicate():
            first = self._from_local_last_dim_shard(first, mesh, module.in_features)
        return (_local(first, mesh, self.inputs, Replicate()), *others), kwargs

    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Any:
        return nullcontext()

    def transform_output_post_forward(
        self, module: nn.Module, output: Tensor, mesh: DeviceMesh
    ) -> Tensor:
        return _local(output, mesh, Replicate(), self.outputs)


def _local(tensor: Tensor, mesh: DeviceMesh, given: Placement, wanted: Placement) -> Tensor:
    """This rank's part of a tensor in placement `given`, redistributed to placement `wanted`."""
    if not isinstance(tensor, DTensor):
        if given == wanted:
            return tensor
        tensor = DTensor.from_local(tensor, mesh, [given], run_check=False)
    local: Tensor = tensor.redistribute(placements=[wanted]).to_local()
    return local


class _SplitOuter(ColwiseParallel):  # type: ignore[misc] # transformers has no types
    """Columns of the outer factor alone; what comes back through it is a part of the gradient."""

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], Any]:
        first, *others = args
        return (_local(first, mesh, Replicate(), Replicate()), *others), kwargs

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        inner = module.get_submodule("down").forward

        def forward(input: Tensor) -> Tensor:
            whole = DTensor.from_local(inner(input), mesh, [Replicate()], run_check=False)
            local: Tensor = whole.to_local(grad_placements=[Partial()])
            return local

        module.get_submodule("down").forward = forward
        installed: nn.Module = super().install_forward(module, mesh)
        return installed


class _ByForm(TensorParallelLayer):  # type: ignore[misc] # transformers has no types
    """A rule of a plan, for linears of which each has a form of its own."""

    def __init__(self, rule: str) -> None:
        self.dense = ALL_PARALLEL_STYLES[rule]
        ends = {"input_layouts": self.dense.input_layouts}
        ends["output_layouts"] = self.dense.output_layouts
        self.by_columns = rule in COLUMNS
        self.rules: dict[Split, TensorParallelLayer] = {
            "whole": _Replicated(**ends),
            "weight": _SplitOuter(**ends),
            "parts": TensorParallelLayer(),
        }

    def of(self, module: nn.Module) -> TensorParallelLayer:
        """The rule of one module."""
        if not isinstance(module, FormLinear):
            return self.dense
        return self.rules[module.split_outputs if self.by_columns else module.split_inputs]

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        self.of(module).validate_param(module, param, mesh, parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        self.of(module).shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        installed: nn.Module = self.of(module).install_forward(module, mesh)
        return installed


class _NoDispatch(TensorParallelLayer):  # type: ignore[misc] # transformers has no types
    """Rule of expert parallelism for the module around compressed experts, which refuses it."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Raises: InputError: always."""
        raise InputError(
            "expert parallelism (ep_size) does not split compressed experts; load the model with "
            "ep_size 1: tp_size splits everything else, and device_map places whole blocks"
        )


def split(model: nn.Module, plan: dict[str, str]) -> None:
    """Replace, in a plan, the rules of linears that are compressed in some block.

    A plan of expert parallelism for experts that are compressed raises when it is applied.
    """
    _drop_experts(model, plan)
    modules = [(replace_layer_number_by_wildcard(n), m) for n, m in model.named_modules()]
    names = {name for name, _ in modules}
    parts: dict[str, set[str]] = {}
    for name, module in modules:
        if isinstance(module, FormLinear):
            found = {f"{name}.{part}" for part in module.parts}
            parts[name] = parts.get(name, set()) | found
    for name in parts.keys() & plan.keys():
        rule = plan[name]
        if rule not in COLUMNS + ROWS:
            continue
        plan[name] = _registered(rule)
        if rule in ROWS:
            plan |= dict.fromkeys(names & parts[name], plan[name])


def _drop_experts(model: nn.Module, plan: dict[str, str]) -> None:
    """Remove the rules for the tensors and the calls of experts that have linears of their own."""
    experts = [n for n, module in model.named_modules() if isinstance(module, Experts)]
    for name in {replace_layer_number_by_wildcard(name) for name in experts}:
        for key in [key for key in plan if key == name or key.startswith(f"{name}.")]:
            if plan.pop(key) == DISPATCH:
                # by the rule of experts the plan is taken for one of expert parallelism; that of
                # the module around them is applied first
                plan[key] = DISPATCH
                around = key.rpartition(".")[0]
                plan[around] = _register(f"orchestrator_{DISPATCH}", _NoDispatch())


def _registered(rule: str) -> str:
    return _register(f"orchestrator_{rule}", _ByForm(rule))


def _register(name: str, style: TensorParallelLayer) -> str:
    """Register a rule under a name, unless the name has one; returns the name."""
    if name not in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(name, style)
    return name
