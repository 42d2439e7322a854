"""Classification of the exceptions that cost a worker: out of memory, or a failed GPU.

Pure functions of an exception, so that they are tested without a GPU. PyTorch raises classes of its
own where CUDA's allocator or runtime fails, and a RuntimeError where a library of CUDA does.
"""

import errno
import re

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from orchestrator.errors import OrchestratorError
from orchestrator.runtime.policy import Cause
from orchestrator.store.chunks import MissingChunk

_OUT_OF_MEMORY = re.compile(
    "|".join(
        [
            r"(CUDA|HIP) out of memory",  # PyTorch's allocator
            r"(CUDA|HIP)( driver)? error: out of memory",  # the runtime, pinned host memory too
            r"NVML_SUCCESS ==",  # PyTorch's query of NVML as it runs out of memory
            r"_STATUS_(\w+_)?ALLOC(ATION)?_FAILED",  # cuBLAS, cuSOLVER, cuDNN, cuSPARSE
            # a library's first allocation is its handle, whose failure has these statuses
            r"_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR),? when calling `cu\w+Create\(",
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
            r"std::bad_alloc",
        ]
    )
)
_DEVICE = re.compile(
    r"(CUDA|HIP)( driver)? error:|(cusolver|cuDNN|MIOpen|hipsolver) error:"
    r"|CUDA unknown error|No (CUDA|HIP) GPUs are available",  # of a process that starts
    re.I,
)


def cause_of_loss(error: BaseException) -> Cause | None:
    """Cause of a worker's loss by an exception; None if any worker would raise it again.

    `OUT_OF_MEMORY`, of the host or of a GPU, is answered by smaller parts. `DIED` is any other
    failure of a GPU: an uncorrectable ECC error, an Xid, an illegal access, a failed launch, an
    assertion in a kernel. After most of them the process can no longer use the GPU. A fault of the
    program, not of the GPU, shows by failing on another one as well.
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


def summary(error: BaseException) -> str:
    """Class and first line of an exception; later lines of CUDA's are advice for debugging."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
