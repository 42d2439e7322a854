"""Linears of one block: names, call order and shared inputs.

Shape suffixes: T tokens, O outputs, I inputs.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.models.experts.module import ExpertLinear, Experts
from orchestrator.models.forms.install import features
from orchestrator.plan.linear import Linear


def check_parameters(where: str, name: str, block: nn.Module) -> None:
    """Check that every matrix of a block is the weight of a linear, an embedding or a norm.

    The router of experts is accepted, and a convolution that mixes no channels.

    Raises:
        InputError: The block has other matrices: experts fused in one parameter, convolutions,
            bare matrices.
    """
    unknown = []
    routers = find_routers(block)
    for path, module in block.named_modules():
        is_vector_like = isinstance(module, nn.Embedding) or "Norm" in type(module).__name__
        is_vector_like |= isinstance(module, nn.Conv1d) and module.groups == module.in_channels
        for key, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, nn.Linear | Conv1D) and key == "weight"
            is_weight |= path in routers and len(parameter) == routers[path]
            if parameter.ndim >= 2 and not is_weight and not is_vector_like:
                is_fused = parameter.ndim == 3 and min(parameter.shape) > 1
                full_name = ".".join(part for part in (name, path, key) if part)
                kind = "fused experts of a" if is_fused else "of a"
                shape = list(parameter.shape)
                unknown.append(f"{full_name} {shape} {kind} {type(module).__name__}")
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"{where}: not supported: {', '.join(unknown[:3])}{more}; "
            "every matrix of a block must be the weight of a linear, an embedding or a norm"
        )


def find_routers(block: nn.Module) -> dict[str, int]:
    """Find the modules that may be routers, beside experts of the same parent, by path.

    Returns:
        The number of experts; a matrix of such a module with as many rows is the router's.
    """
    routers = {}
    for path, module in block.named_modules():
        for name, child in module.named_children():
            if isinstance(child, Experts):
                beside = [other for other, _ in module.named_children() if other != name]
                paths = [f"{path}.{other}".lstrip(".") for other in beside]
                routers.update(dict.fromkeys([path, *paths], len(child.numbers)))
    return routers


def _is_gate(role: str, module: nn.Module, routers: Mapping[str, int]) -> bool:
    """Test if a linear is a router, or the gate of a shared expert: one output, beside experts."""
    return role in routers and features(module)[1] in (1, routers[role])


class LinearCalls:
    """Context manager that records the calls of a block's linears: order and input of each."""

    def __init__(self, name: str, block: nn.Module | None) -> None:
        self.name = name
        self.modules: dict[str, nn.Module] = {}
        if block is not None:
            routers = find_routers(block)
            self.modules = {
                role: module
                for role, module in block.named_modules()
                if isinstance(module, nn.Linear | Conv1D) and not _is_gate(role, module, routers)
            }
        self.calls: list[tuple[str, Hashable]] = []
        """Role and input identity of each call, in order."""
        self._seen: list[Tensor] = []
        """Tensors kept alive, so that their memory is not reused and identities stay unique."""
        self._norms: dict[Hashable, str] = {}
        """Name of the norm that produced a tensor, by the tensor's identity."""
        self._expert_norms: dict[str, str] = {}
        """Norm that the rows of each expert's first linears come from, by role."""
        self._block = block

    def __enter__(self) -> None:
        self.handles = [
            module.register_forward_pre_hook(self._call_recorder(role), with_kwargs=True)
            for role, module in self.modules.items()
        ]
        for path, module in self._block.named_modules() if self._block is not None else ():
            if "Norm" in type(module).__name__:
                self.handles.append(module.register_forward_hook(self._norm_recorder(path)))
            for name, child in module.named_children():
                if isinstance(child, Experts):
                    record = self._rows_recorder(f"{path}.{name}".lstrip("."), child)
                    self.handles.append(module.register_forward_pre_hook(record))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _call_recorder(self, role: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = args[0] if args else kwargs["input"]
            self._seen.append(tensor)
            self.calls.append((role, _identity(tensor)))

        return record

    def _norm_recorder(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._seen.append(output)
                self._norms[_identity(output)] = f"{self.name}.{path}"

        return record

    def _rows_recorder(self, path: str, experts: Experts) -> Callable[[nn.Module, Any], None]:
        names = [name for name, each in experts.named_modules() if isinstance(each, nn.Linear)]
        first = [name for name in names if not name.endswith(".down")]

        def record(module: nn.Module, args: Any) -> None:
            norm = self._norms.get(_identity(args[0]), "") if args else ""
            self._expert_norms.update(dict.fromkeys((f"{path}.{role}" for role in first), norm))

        return record

    def linears(self, where: str, block: int) -> list[Linear]:
        """Return the block's linears in call order.

        Raises:
            InputError: A linear is not called exactly once, or its class does not compute
                x Wᵀ + b.
        """
        counts = Counter(role for role, _ in self.calls)
        for role, module in self.modules.items():
            if counts[role] != 1:
                raise InputError(
                    f"{where}: {self.name}.{role} is called {counts[role]} times in a "
                    "forward pass; every linear of a block must be called exactly once"
                )
            if not _is_linear(module):
                raise InputError(
                    f"{where}: {self.name}.{role} is a {type(module).__name__}, "
                    "which does not compute x Wᵀ + b"
                )
        sites: dict[Hashable, str] = {}
        linears = []
        for role, identity in self.calls:
            module = self.modules[role]
            name = f"{self.name}.{role}"
            in_features, out_features = features(module)
            linears.append(
                Linear(
                    name=name,
                    block=block,
                    role=role,
                    site=sites.setdefault(identity, name),
                    out_features=out_features,
                    in_features=in_features,
                    has_bias=module.bias is not None,
                    norm=self._norms.get(identity, self._expert_norms.get(role, "")),
                )
            )
        return linears


def _identity(tensor: Tensor) -> Hashable:
    """Identity of a tensor: equal for two live tensors only if memory and values are the same.

    The version counter distinguishes a tensor from itself after an in-place change.
    """
    storage = tensor.untyped_storage()._cdata
    return storage, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride()


def _is_linear(module: nn.Module) -> bool:
    """Test if a module computes x Wᵀ + b (`Conv1D`: x W + b); subclasses run on a small probe."""
    if type(module) in {nn.Linear, Conv1D, ExpertLinear}:
        return True
    generator = torch.Generator().manual_seed(0)
    input_TI, weight_OI, bias_O = (
        torch.randn(shape, generator=generator) for shape in [(4, 3), (2, 3), (2,)]
    )
    probe: Any = copy.copy(module)
    probe._parameters = {
        "weight": nn.Parameter(weight_OI.T if isinstance(module, Conv1D) else weight_OI),
        "bias": None if module.bias is None else nn.Parameter(bias_O),
    }
    probe.in_features, probe.out_features, probe.nf = 3, 2, 2
    with torch.no_grad():
        output_TO = probe(input_TI)
        expected_TO = linear(input_TI, weight_OI, probe.bias)
    return isinstance(output_TO, Tensor) and torch.allclose(output_TO, expected_TO, atol=1e-5)
