"""Facts of a worker's GPU: library versions, memory, and why PyTorch sees none."""

import os
import socket
from collections.abc import Mapping, Sequence
from ctypes import CDLL, create_string_buffer
from functools import cache
from typing import Any

import torch

from orchestrator.errors import InputError

PRETENDED = "ORCHESTRATOR_PRETENDED_GPUS"
"""Environment variable of a driver whose nodes only declare GPUs, for tests of a cluster: with any
value workers compute on CPUs."""
UNKNOWN = "unknown"
_NVML = "libnvidia-ml.so.1"
_VERSION_BYTES = 80
"""NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE."""


def versions() -> dict[str, str]:
    """Versions of the libraries under PyTorch: CUDA (or ROCm), cuDNN and the driver."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "cuda": torch.version.cuda or torch.version.hip or UNKNOWN,
        "cudnn": UNKNOWN if cudnn is None else str(cudnn),
        "driver": driver_version(),
    }


def memory_bytes() -> int | None:
    """Memory of this process's GPU, for a MIG slice that of the slice; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


@cache
def driver_version() -> str:
    """Version of NVIDIA's driver by NVML, such as `550.54.15`; `unknown` if NVML fails."""
    try:
        nvml = CDLL(_NVML)
        if nvml.nvmlInit_v2() != 0:
            return UNKNOWN
        try:
            found = create_string_buffer(_VERSION_BYTES)
            failed = nvml.nvmlSystemGetDriverVersion(found, _VERSION_BYTES)
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return UNKNOWN
    return UNKNOWN if failed else found.value.decode(errors="replace")


def unseen(given: Sequence[Any]) -> str:
    """Error message if Ray has assigned GPUs to this process and PyTorch sees none; else empty.

    Args:
        given: Ray's ids of the assigned GPUs.
    """
    if not given or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        why = "a build without CUDA; install one with it"
    else:
        why = (
            f"built for CUDA {torch.version.cuda}, on driver {driver_version()}; `nvidia-smi` says "
            "which CUDA that driver has: update it or install a build for it, and give a container "
            "its GPUs"
        )
    return (
        f"node {socket.gethostname()}: Ray gave a worker GPU {', '.join(map(str, given))}, but "
        f"torch {torch.__version__} sees none: it is {why}; or start the node with --num-gpus 0"
    )


def check_seen(probe: Mapping[str, Any]) -> None:
    """Raise InputError if a worker was given a GPU that it does not see."""
    if probe["unseen"] and PRETENDED not in os.environ:
        raise InputError(probe["unseen"])
