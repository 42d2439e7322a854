"""Release of freed memory: kept by the allocators between chunks, returned after a shard.

On the host the allocator is glibc's, on a GPU PyTorch's caching allocator.
"""

import ctypes
from contextlib import suppress

import torch

LARGEST_KEPT_BYTES = 32 * 2**20
MOST_KEPT_BYTES = 256 * 2**20
ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""For the environment of a process that is to be a worker, since glibc reads it once.

Each thread may otherwise have a heap of its own, and keeps there what it has freed. The dozens of
threads beside the one that computes then let a worker grow with the units that it has done:
measured 2.4 MB a block of 512 channels, and nothing with two heaps.
"""
# names of two parameters in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Lets buffers that are freed be used again without asking the system for them.

    Every chunk takes the same few megabytes that the one before it has freed. Left alone, glibc
    may return them each time, and the kernel zeroes them page by page when they are touched:
    measured up to a quarter of the time of a forward pass of SmolLM2. Buffers above
    `LARGEST_KEPT_BYTES` still go back at once.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


def return_freed_memory() -> None:
    """Gives everything that is free back to the system.

    After a shard is closed, or its weights stay as holes between small objects, the next shard's
    do not fit into them, and a process grows to more than twice its shard. On a GPU the same holds
    for libraries that allocate outside of PyTorch, and for other processes.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_device_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU.

    Free bytes of the driver, and unused bytes that PyTorch's allocator keeps: it reuses them, or
    releases them before it fails.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
