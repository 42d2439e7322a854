"""Deterministic algorithms where gradients flow, and the environment that CUDA needs for them.

On CUDA some backward passes add with atomics, in an order that differs from call to call: that of
fused attention, of indexing, of `index_add` and `scatter_add`. PyTorch has deterministic versions,
which cost more, so they are on around backward passes alone: everywhere else a repeated call gives
the same bits on the same device anyway.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

CUDA_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Read once by a process, when it first uses CUDA; on a CPU neither does anything.

Without the first, cuBLAS may choose another algorithm from call to call, and PyTorch refuses matrix
products while deterministic algorithms are on. With the second, the allocator grows its segments in
place: blocks of many sizes come and go, and memory in pieces would not fit the next.
"""
_OLDER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}


@contextmanager
def strict() -> Iterator[None]:
    """Has PyTorch use deterministic algorithms; what was set before is restored on the way out.

    Both the forward pass that records and the backward pass belong inside: cuDNN's attention has no
    deterministic backward pass and is avoided only in the forward pass. Contexts may be nested. On
    a CPU with one thread no bit depends on it. Uninitialized memory is not filled.

    Cost on CUDA: one more accumulation buffer or pass in attention's backward, a sort of the
    indices in each `index_put`, `scatter` and `index_add`.

    The setting is the process's, so one thread at a time may compute. `torch.
    use_deterministic_algorithms` is not called: it would load and set up Inductor too.

    Raises:
        RuntimeError: On CUDA, from inside: an operation of the model has no deterministic
            algorithm, or the process has multiplied matrices before `CUDA_ENVIRONMENT` was set.

    References:
        https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    memory: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills


def cuda_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process that may use CUDA: those of `own` where it has them."""
    found: dict[str, str] = {}
    for name, value in CUDA_ENVIRONMENT.items():
        names = (name, _OLDER_NAMES.get(name, name))
        found |= {each: own[each] for each in names if each in own} or {name: value}
    return found


@contextmanager
def cuda_environment_here() -> Iterator[None]:
    """Sets `cuda_environment` in this process, and removes the variables that it has set."""
    added = {n: v for n, v in cuda_environment(os.environ).items() if n not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
