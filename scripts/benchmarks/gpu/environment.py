"""Prints the environment of results as JSON: device, driver, versions, commit.

A separate program, so that the supervising process has no CUDA context.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from orchestrator.models.evaluation.machine import host_bytes

ROOT = Path(__file__).parents[3]
COMMIT = ("--always", "--dirty", "--abbrev=40", "--exclude=*")


def environment() -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": platform.machine(),
        "cuda_device": None,
        "memory_bytes": host_bytes(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if is_cuda:
        device = torch.cuda.get_device_properties(0)
        found = {
            "device": device.name,
            "cuda_device": device.name,
            "memory_bytes": device.total_memory,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
        }
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found | {
        "driver": first_line(driver),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **{name: installed(name) for name in ("transformers", "numpy", "safetensors")},
        "commit": first_line(("git", "-C", str(ROOT), "describe", *COMMIT)),
        "date": time.strftime("%Y-%m-%dT%H:%M", time.gmtime()),
    }


def first_line(command: Sequence[str]) -> str | None:
    """First line of a program's output; None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(environment()))
