"""Simulated CUDA device: its tensors compute on the CPU and obey CUDA's rules.

    with pretended_device() as device:
        compress(Recipe(..., executor="local"))
    assert not device.unordered

Inside, `torch.cuda.is_available()` is true, and a tensor made on or moved to "cuda" is a
`Pretended`, a wrapper subclass around a CPU tensor: `device` is cuda:0, `numpy()` fails as on CUDA,
and each aten operation first checks its operands by CUDA's rules. Results are the CPU's to the bit,
so a difference is a fault of the program (another path on a GPU, a missing conversion), never
rounding. `AdamW(fused=True)`, which on CUDA has a kernel of its own, is computed by the loop over
parameters, the default on the CPU: the bits are those of a CPU run without `fused`.

`PretendedDevice` lists the costs of a run on a GPU, each with its line in the program: `reads` of
values by the host, `copies` with their bytes, `conversions` of host tensors, `unordered` sums,
`stream_calls`; beside them `memory`, in which allocations may fail, and `order`, the streams, whose
synchronisation is checked. `clear` empties the lists between parts of a test.

Not covered: rounding of CUDA's kernels, operations without a CUDA kernel (except products of
integers), workspaces inside an operation, time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pretend_device import (
    TO_DEVICE,
    TO_HOST,
    Conversion,
    Copy,
    PretendedDevice,
    Read,
    Unordered,
    the_device,
    use,
)
from pretend_site import Site, site
from pretend_streams import Event
from pretend_tensor import CPU, CUDA, Pretended, address, is_cuda, is_plain, plain, wrap, wrapped
from torch import Tensor
from torch.overrides import TorchFunctionMode

from orchestrator.device import transport
from orchestrator.models.survey.trees import map_tensors

__all__ = [
    "CUDA",
    "TO_DEVICE",
    "TO_HOST",
    "Conversion",
    "Copy",
    "Pretended",
    "PretendedDevice",
    "Read",
    "Site",
    "Unordered",
    "on_host",
    "pretended_device",
]
CONVERSIONS = frozenset(["contiguous", "float", "double", "half", "bfloat16", "type"])
"""Methods, in addition to `to`, that may copy a host tensor to another dtype or order."""
REAL_BACKWARD = torch.autograd.backward
REAL_COMPATIBLE = torch._has_compatible_shallow_copy_type
VALUES_ALONE = (torch.linalg.eigvalsh, torch.linalg.svdvals)
"""Functions that compute vectors too for a tensor subclass, by another algorithm."""


@contextmanager
def pretended_device(total: int = 80 * 10**9) -> Iterator[PretendedDevice]:
    """Make torch find one CUDA device, in this thread and in threads started inside.

    Tensors of the device stay usable afterwards, with the same rules.

    Args:
        total: Bytes of the device's memory.
    """
    device = PretendedDevice(total)
    patch = mock.patch.object
    with ExitStack() as stack:
        stack.enter_context(use(device))
        for name, function in _functions_of_cuda(device).items():
            stack.enter_context(patch(torch.cuda, name, function))
        stack.enter_context(patch(torch, "Generator", GeneratorOfAnyDevice))
        run = _in_mode(threading.Thread.run)
        stack.enter_context(patch(threading.Thread, "run", run))
        # a mode is off while it handles a function, and hooks of a backward pass need it
        stack.enter_context(patch(torch.autograd, "backward", _backward))
        stack.enter_context(patch(torch.autograd, "has_torch_function", lambda _: False))
        # a moved module then gets new parameters instead of new data in its old ones
        stack.enter_context(patch(torch, "_has_compatible_shallow_copy_type", _take_data_alike))
        stack.enter_context(FunctionMode())
        # streams are made once for each device
        transport.lanes_of.cache_clear()
        stack.callback(transport.lanes_of.cache_clear)
        yield device


def on_host(tree: Any) -> Any:
    """Copy a tree of tensors to the CPU, without counting copies."""
    return map_tensors(lambda each: plain(each).detach().clone(), tree)


def _any_pretended(*tensors: Any) -> bool:
    return any(isinstance(tensor, Pretended) for tensor in tensors)


def _take_data_alike(one: Tensor, other: Tensor) -> bool:
    """True if a tensor of the CPU can take the data of the other one."""
    return not _any_pretended(one, other) and REAL_COMPATIBLE(one, other)


def _in_mode(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """`Thread.run` with the mode, which holds for one thread."""

    def run_pretending(thread: threading.Thread) -> None:
        with FunctionMode():
            run(thread)

    return run_pretending


def _functions_of_cuda(device: PretendedDevice) -> dict[str, Any]:
    """The functions of `torch.cuda`, by name."""
    memory, order, name = device.memory, device.order, "Pretended"
    properties = SimpleNamespace(
        name=name, total_memory=memory.total, multi_processor_count=132, major=9, minor=0
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "device": lambda *_: nullcontext(),
        "manual_seed_all": lambda *_: None,  # numbers without a generator are the CPU's
        "get_device_name": lambda *_: name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "synchronize": order.synchronize,
        "empty_cache": memory.empty_cache,
        "mem_get_info": lambda *_: (memory.total - memory.reserved, memory.total),
        "memory_allocated": lambda *_: memory.allocated,
        "max_memory_allocated": lambda *_: memory.peak,
        "memory_reserved": lambda *_: memory.reserved,
        "max_memory_reserved": lambda *_: memory.peak_reserved,
        "reset_peak_memory_stats": lambda *_: memory.reset_peak(),
        "Stream": order.new_stream,
        "Event": partial(Event, order=order),
        "stream": order.within,
        "current_stream": lambda *_: order.stream,
        "default_stream": lambda *_: order.streams[0],
        "set_stream": lambda stream: setattr(order, "stream", stream),
    }


class Generator(torch.Generator):
    """A generator of the device; draws the CPU's numbers."""

    device = property(lambda self: CUDA)


class GeneratorOfAnyDevice(torch.Generator):
    """Replacement of `torch.Generator`."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return Generator("cpu") if is_cuda(device) else torch._C.Generator(device)


class FunctionMode(TorchFunctionMode):
    """Makes and moves tensors of the device; checks generators and gradients."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as):
            return _move(func, *args, **kwargs)
        if isinstance(first, Pretended) and name in vars(Pretended) and name[0] != "_":
            return getattr(Pretended, name)(*args, **kwargs)
        if func is Tensor.new_tensor and isinstance(first, Pretended):
            func, name, args = torch.tensor, "tensor", args[1:]
            kwargs = {"device": CUDA, "dtype": first.dtype} | kwargs
        if func is Tensor.pin_memory:
            return the_device().pin(first.clone())
        if func is Tensor.is_pinned:
            return the_device().is_pinned(first)
        if func in VALUES_ALONE and isinstance(first, Pretended) and not first.requires_grad:
            the_device().read(name)
            return wrap(func(first.inner, *args[1:], **kwargs))
        if func is Tensor.backward:
            with self:
                return _backward(first, kwargs.pop("gradient"), **kwargs)
        if name == "__set__" and func == Tensor.grad.__set__:
            _refuse_gradient(*args)
        if name == "__set__" and func == Tensor.data.__set__ and _any_pretended(*args):
            raise NotImplementedError(f"assignment to Tensor.data ({site()}); use copy_")
        _refuse_generator(args, kwargs)
        pins = kwargs.pop("pin_memory", False)
        out = _make(func, name, args, kwargs) if "device" in kwargs else func(*args, **kwargs)
        if name in CONVERSIONS:
            _note_conversion(name, first, out)
        return the_device().pin(out) if pins else out


def _make(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function with a `device` argument."""
    on_device = is_cuda(kwargs["device"])
    if on_device:
        kwargs["device"] = CPU
    plain_args, plain_kwargs = plain((args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not on_device:
        return out
    the_device().order.operate((), ())
    if name in ("tensor", "as_tensor", "asarray"):
        the_device().copy(TO_DEVICE, out, out, non_blocking=False)
    return wrapped(out)


def _move(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` and related methods."""
    device, dtype, non_blocking, copies = _destination(func, args, kwargs)
    if device is not None and torch.device(device).type == "meta":
        return plain(tensor).to("meta", dtype)
    on_device = isinstance(tensor, Pretended)
    to_device = on_device if device is None else is_cuda(device)
    if on_device == to_device:
        out = Tensor.to(tensor, dtype or tensor.dtype, copy=copies)
        _note_conversion("to", tensor, out)
        return out
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"a differentiable copy between devices ({site()})")
    source = plain(tensor).detach()
    target = source.to(dtype or source.dtype, copy=True)
    the_device().order.operate([address(tensor)] if on_device else (), ())
    if on_device and non_blocking:
        the_device().pin(target)  # as CUDA makes it
    direction = TO_DEVICE if to_device else TO_HOST
    out = Pretended(target) if to_device else target
    the_device().copy(direction, source, target, non_blocking=non_blocking)
    return out


def _destination(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, torch.dtype | None, bool, bool]:
    """Return device, dtype, True for a non-blocking copy, and True if a copy is always made."""
    if func is Tensor.cpu:
        return CPU, None, False, False
    if func is Tensor.cuda:
        return CUDA, None, kwargs.get("non_blocking", any(args[1:2])), False
    rest, device, dtype = list(args), kwargs.get("device"), kwargs.get("dtype")
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
        device, dtype = other.device, other.dtype
    if rest and not isinstance(rest[0], torch.dtype | bool):
        device = rest.pop(0)
    if rest and not isinstance(rest[0], bool):
        dtype = rest.pop(0)
    non_blocking, copies, *_ = [*rest, False, False]
    return device, dtype, kwargs.get("non_blocking", non_blocking), kwargs.get("copy", copies)


def _note_conversion(name: str, before: Any, after: Any) -> None:
    """Note a copy of a host tensor in another dtype or order."""
    if is_plain(before) and after is not before and (name != "to" or before.dtype != after.dtype):
        the_device().conversions.append(Conversion(name, after.nbytes, site()))


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    """`torch.autograd.backward` with CUDA's check of devices."""
    if isinstance(tensors, Tensor):
        tensors, grad_tensors = (tensors,), (grad_tensors,)
    for tensor, gradient in zip(tensors, grad_tensors or (), strict=False):
        _refuse_gradient(tensor, gradient)
    REAL_BACKWARD(tensors, grad_tensors, *args, **kwargs)


def _refuse_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    """Raise for a gradient on another device than its tensor."""
    if gradient is not None and gradient.device != tensor.device:
        raise RuntimeError(
            f"the gradient lies on {gradient.device}, its tensor on {tensor.device} ({site()})"
        )


def _refuse_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for a generator of another device than the numbers that it draws."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    wanted = is_cuda(kwargs.get("device")) or _any_pretended(*args)
    if wanted != isinstance(generator, Generator):
        raise RuntimeError(
            f"Expected a '{'cuda' if wanted else 'cpu'}' device type for generator but found "
            f"'{generator.device.type}' ({site()})"
        )
