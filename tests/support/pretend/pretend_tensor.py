"""Tensors of a simulated CUDA device, and CUDA's rules for their operands; see `pretend`."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pretend_device import TO_DEVICE, TO_HOST, Unordered, the_device
from pretend_site import site
from torch import Tensor
from torch.optim.adam import _single_tensor_adam
from torch.utils._python_dispatch import return_and_correct_aliasing

from orchestrator.models.survey.trees import map_tensors

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
LEAVES = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout])
"""Types of arguments without tensors in them."""

SCALARS_ALLOWED = frozenset(
    [
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "pow",
        "remainder",
        "floor_divide",
        "fmod",
        "maximum",
        "minimum",
        "where",
        "lerp",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "__and__",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
        "atan2",
        "copysign",
        "xlogy",
        "hypot",
        "fill",
        "masked_fill",
        "clamp_min",
        "clamp_max",
        "threshold_backward",
        "silu_backward",
        "gelu_backward",
        "_foreach_add",
        "_foreach_mul",
        "_foreach_div",
    ]
)
"""Operations that take CPU tensors without dimensions as operands, those of a TensorIterator with
`allow_cpu_scalars`."""
INDEXING = frozenset(["index", "index_put", "_index_put_impl"])
"""Operations that copy indices on the CPU to the device."""
READS = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "masked_scatter_backward",
        "equal",
        "is_nonzero",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "repeat_interleave",
        "multinomial",
        "segment_reduce",
        "_linalg_eigh",
        "_linalg_svd",
        "_linalg_check_errors",
        "linalg_eig",
        "linalg_lstsq",
    ]
)
"""Operations that wait for a value of the device: for the size of their result, unless it is given,
or to check it, unless that is waived."""
PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm"])
"""Operations of cuBLAS, of floating point; strict algorithms allow them with a fixed workspace."""
ORDERED_IF_STRICT = frozenset(
    [
        "index_add",
        "scatter_add",
        "index_copy",
        "scatter_reduce",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ]
)
"""Operations with a fixed order of sums under `torch.use_deterministic_algorithms` alone; beside
them `index_put` that accumulates and `scatter` of a tensor."""
NEVER_ORDERED = frozenset(["put", "histc", "median", "kthvalue", "nll_loss2d_forward"])
"""Operations that raise under `torch.use_deterministic_algorithms`; beside them `cumsum` of
floating point, `bincount` with weights and `scatter_reduce` of products."""


class Pretended(Tensor):
    """A tensor of the device; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "Pretended":
        assert is_plain(inner)
        self: Pretended = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,  # autograd of a CPU build knows no other
            requires_grad=requires_grad,
        )
        self.inner = inner.detach() if inner.requires_grad else inner
        the_device().memory.hold(self, inner.untyped_storage())
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {CUDA})"

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() to copy the "
            f"tensor to host memory first. ({site()})"
        )

    __array__ = numpy

    def tolist(self) -> Any:
        the_device().read("tolist")
        return self.inner.tolist()

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError(f"cannot pin a tensor of {CUDA}, only dense CPU tensors ({site()})")

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        stream.note("record_stream")
        the_device().order.record(address(self), stream)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        _refuse_mixed(name, args, kwargs)
        _refuse_kernels(name, args, kwargs)
        _keep_order(func, args, kwargs)
        _note_reads(name, args, kwargs)
        plain_args, plain_kwargs = plain((args, kwargs))
        if is_cuda(plain_kwargs.get("device")):
            plain_kwargs["device"] = CPU
        if name == "_fused_adamw":
            return _adamw(plain_args, plain_kwargs)
        out = func(*plain_args, **plain_kwargs)
        if name == "copy":
            _note_copy(args, kwargs)
            if is_plain(args[0]):
                return args[0]
        return return_and_correct_aliasing(func, args, kwargs, wrapped(out))


def is_plain(value: Any) -> bool:
    """True for a tensor of the CPU."""
    return isinstance(value, Tensor) and not isinstance(value, Pretended)


def is_cuda(device: Any) -> bool:
    """True if a device, as torch takes one, is the pretended one."""
    return device is not None and torch.device(device).type == "cuda"


def plain(tree: Any) -> Any:
    """A tree with the device's tensors replaced by their inner ones."""
    kind = type(tree)
    if kind is Pretended:
        return tree.inner
    if kind is tuple:
        return tuple([plain(each) for each in tree])
    if kind is list:
        return [plain(each) for each in tree]
    if kind is dict:
        return {name: plain(each) for name, each in tree.items()}
    if kind in LEAVES:
        return tree
    return map_tensors(lambda each: each.inner if isinstance(each, Pretended) else each, tree)


def wrapped(tree: Any) -> Any:
    """A tree with plain tensors replaced by tensors of the device on the same memory."""
    return wrap(tree) if type(tree) is Tensor else map_tensors(wrap, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a tree, in its order."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    """Append the tensors in a tree."""
    if type(tree) in LEAVES:
        return
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list | dict):
        for each in tree.values() if isinstance(tree, dict) else tree:
            _collect(each, found)


def wrap(tensor: Tensor) -> Pretended:
    if isinstance(tensor, Pretended):
        return tensor
    return Pretended(tensor.detach(), tensor.requires_grad)


def _refuse_mixed(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise as CUDA does for operands on two devices, with its exceptions."""
    tensors = tensors_of((args, kwargs))
    strangers = [each for each in tensors if not isinstance(each, Pretended)]
    if not strangers or len(strangers) == len(tensors) or name == "copy":
        return
    indexes = name in INDEXING and isinstance(args[0], Pretended)
    if indexes:
        strangers = [each for each in tensors_of(args[2:]) if is_plain(each)]
    if (indexes or name in SCALARS_ALLOWED) and all(each.dim() == 0 for each in strangers):
        return
    shapes = ", ".join(str(tuple(each.shape)) for each in strangers)
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{CUDA} and cpu! ({name} with {shapes} on the CPU, {site()})"
    )


def _refuse_kernels(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise for an operation without a kernel, or without a strict one where that is asked for.

    Notes an operation without a fixed order of sums.
    """
    is_strict = torch.are_deterministic_algorithms_enabled()
    if name in PRODUCTS and not (args[0].is_floating_point() or args[0].is_complex()):
        raise NotImplementedError(f"{name} has no kernel for {args[0].dtype} on CUDA ({site()})")
    if is_strict and name in PRODUCTS:
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        if workspace not in (":4096:8", ":16:8"):
            raise RuntimeError(
                "Deterministic behavior was enabled, but this operation is not deterministic "
                f"because it uses cuBLAS; CUBLAS_WORKSPACE_CONFIG is {workspace}, set it to "
                f":4096:8 or :16:8 ({name}, {site()})"
            )
    is_never, is_if_strict = _order(name, args, kwargs)
    if is_strict and is_never and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"{name} does not have a deterministic implementation ({site()})")
    if is_never or (is_if_strict and not is_strict):
        in_backward = torch._C._current_graph_task_id() != -1
        the_device().unordered.append(Unordered(name, in_backward, site()))


def _order(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, bool]:
    """Two flags: the order of sums on CUDA is never fixed, and it is under strict algorithms."""
    if name == "cumsum":
        return args[0].is_floating_point(), False
    if name == "bincount":
        return len(args) > 1 and args[1] is not None, False
    if name == "scatter_reduce":
        return "prod" in (each for each in args if isinstance(each, str)), True
    if name == "scatter":
        return False, isinstance(args[3], Tensor)
    if name in INDEXING:
        return False, name != "index" and any(args[3:4])
    return name in NEVER_ORDERED, name in ORDERED_IF_STRICT


def _keep_order(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Add an operation to the current stream, with the memory that it reads and writes."""
    order = the_device().order
    if len(order.streams) == 1:
        order.operate((), ())
        return
    places, names = _written(func)
    read, written = list[int](), list[int]()
    for place, value in enumerate(args):
        _add_addresses(value, written if place in places else read)
    for name, value in kwargs.items():
        _add_addresses(value, written if name in names else read)
    order.operate(read, written)


@cache
def _written(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Places and names of the arguments that an operation writes to."""
    found = [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return frozenset(place for place, _ in found), frozenset(name for _, name in found)


def _add_addresses(tree: Any, found: list[int]) -> None:
    """Append the addresses of the device's tensors in a tree, except for empty ones."""
    for tensor in tensors_of(tree):
        if isinstance(tensor, Pretended) and tensor.inner.numel():
            found.append(address(tensor))


@cache
def _name(func: Any) -> str:
    """Name of an operation, without the underscore of one that works in place."""
    full_name: str = func._schema.name.split("::")[1]
    return full_name.rstrip("_") or full_name


def address(tensor: Pretended) -> int:
    """The address of a tensor's storage, which its views share."""
    return tensor.inner.untyped_storage().data_ptr()


def _note_reads(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Note waits of the host, and copies of indices on the host."""
    device = the_device()
    if name in READS and kwargs.get("output_size") is None and not kwargs.get("unsafe"):
        device.read(name)
    if name not in INDEXING or is_plain(args[0]):
        return
    indices = [index for index in args[1] if index is not None]
    # one value under one mask is filled in, and no entry has to be found
    fills = name != "index" and len(indices) == 1 and args[2].numel() == 1 and not any(args[3:4])
    for index in indices:
        is_mask = index.dtype in (torch.bool, torch.uint8)
        if is_plain(index):
            copied = index.nonzero() if is_mask and not fills else index
            device.copy(TO_DEVICE, copied, copied, non_blocking=False)
        elif is_mask and not fills:
            device.read("mask")


def _note_copy(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Note a `copy_` between devices."""
    if is_plain(args[0]) != is_plain(args[1]):
        target, source = plain(args[:2])
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        direction = TO_HOST if is_plain(args[0]) else TO_DEVICE
        the_device().copy(direction, source, target, non_blocking=non_blocking)


def _adamw(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """The fused step of AdamW, by the loop over parameters that is the CPU's default."""
    *states, steps = args
    names = ("amsgrad", "beta1", "beta2", "lr", "weight_decay", "eps", "maximize")
    _single_tensor_adam(
        *states,
        [step - 1 for step in steps],  # the caller has counted this step, and the loop does too
        **{name: kwargs[name] for name in names},
        grad_scale=None,
        found_inf=None,
        has_complex=False,
        capturable=False,
        differentiable=False,
        decoupled_weight_decay=True,
    )
