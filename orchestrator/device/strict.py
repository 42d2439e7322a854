"""Deterministic algorithms for backward passes, and the environment that CUDA needs for them.

On CUDA some backward passes use atomic additions, whose order varies between calls: fused
attention, indexing, `index_add` and `scatter_add`. PyTorch has deterministic versions, which are
slower, so they are enabled for backward passes only: all other calls are reproducible on the same
device anyway.
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
"""Environment variables that a process reads at its first use of CUDA; no effect on a CPU.

Without the first, cuBLAS may choose another algorithm from call to call, and PyTorch refuses matrix
products while deterministic algorithms are on. With the second, the allocator grows its segments in
place, which avoids fragmentation by blocks of many sizes.
"""
_OLDER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}


@contextmanager
def strict() -> Iterator[None]:
    """Enable deterministic algorithms of PyTorch; the previous setting is restored at the end.

    Both the recorded forward pass and the backward pass must be inside: cuDNN's attention has no
    deterministic backward pass and is avoided in the forward pass. Contexts may be nested. On a CPU
    with one thread it changes no bit. Uninitialized memory is not filled.

    Cost on CUDA: one more accumulation buffer or pass in attention's backward, a sort of the
    indices in each `index_put`, `scatter` and `index_add`.

    The setting belongs to the process, so only one thread may compute at a time. `torch.
    use_deterministic_algorithms` is not called: it would load and set up Inductor too.

    Raises:
        RuntimeError: Raised on CUDA within the context: an operation of the model has no
            deterministic algorithm, or the process multiplied matrices before `CUDA_ENVIRONMENT`
            was set.

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
    """Environment variables for a process that may use CUDA; values in `own` take precedence."""
    found: dict[str, str] = {}
    for name, value in CUDA_ENVIRONMENT.items():
        names = (name, _OLDER_NAMES.get(name, name))
        found |= {each: own[each] for each in names if each in own} or {name: value}
    return found


@contextmanager
def cuda_environment_here() -> Iterator[None]:
    """Set `cuda_environment` in this process; variables that it added are removed at the end."""
    added = {n: v for n, v in cuda_environment(os.environ).items() if n not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
