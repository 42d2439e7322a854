"""Exceptions that cost a worker: what is told of memory and of a GPU by what a call raised.

Pure functions of an exception, so that they are tested without a GPU. PyTorch raises classes of its
own where CUDA's allocator or runtime fails, and a RuntimeError where a library of CUDA does.
"""

import errno
import re

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from orchestrator.cluster.policy import Cause
from orchestrator.errors import OrchestratorError
from orchestrator.store.chunks import MissingChunk

_OUT_OF_MEMORY = re.compile(
    "|".join(
        [
            r"(CUDA|HIP) out of memory",  # PyTorch's allocator
            r"(CUDA|HIP)( driver)? error: out of memory",  # the runtime, pinned host memory too
            r"NVML_SUCCESS ==",  # what PyTorch asks NVML as it runs out of memory
            r"_STATUS_(\w+_)?ALLOC(ATION)?_FAILED",  # cuBLAS, cuSOLVER, cuDNN, cuSPARSE
            # a library's handle is the first that it allocates, and these are all it says of it
            r"_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR),? when calling `cu\w+Create\(",
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
            r"std::bad_alloc",
        ]
    )
)
_DEVICE = re.compile(r"(CUDA|HIP)( driver)? error:|(cusolver|cuDNN|MIOpen|hipsolver) error:", re.I)


def loss_of(error: BaseException) -> Cause | None:
    """How an exception costs its worker; None for one that any worker would raise again.

    `OUT_OF_MEMORY`, whoever ran out, is answered by smaller parts. `DIED` is any other failure of a
    GPU: an uncorrectable ECC error, an Xid, an illegal access, a failed launch, an assertion in a
    kernel. After most of them nothing can be computed in the process, and which of them lie with
    the program and not with the GPU is told by what happens on another one.
    """
    text = str(error)
    if isinstance(error, OrchestratorError | MissingChunk | LinAlgError):
        return None
    if isinstance(error, OSError):
        return Cause.OUT_OF_MEMORY if error.errno == errno.ENOMEM else None
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_memory or _OUT_OF_MEMORY.search(text):
        return Cause.OUT_OF_MEMORY
    is_device = isinstance(error, torch.AcceleratorError) or _DEVICE.search(text)
    return Cause.DIED if is_device else None


def said(error: BaseException) -> str:
    """An exception's class and its first line: CUDA's go on with advice for debugging."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
