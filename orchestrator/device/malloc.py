"""Control of freed memory: kept by the allocators between chunks, returned after a shard.

On the host the allocator is glibc's, on a GPU PyTorch's caching allocator.
"""

import ctypes
from contextlib import suppress

import torch

LARGEST_KEPT_BYTES = 32 * 2**20
MOST_KEPT_BYTES = 256 * 2**20
ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""Environment of worker processes; glibc reads it once, at start.

By default each thread may have its own heap and keeps freed memory there. With dozens of threads
beside the computing one, the memory of a worker grows with the number of finished units: measured
2.4 MB per block of 512 channels, and no growth with two heaps.
"""
# two parameters defined in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Keep freed buffers in the process for reuse.

    Every chunk needs the few megabytes that the previous one freed. By default glibc may return
    them each time, and the kernel zeroes the pages again on first access: measured up to a quarter
    of the time of a forward pass of SmolLM2. Buffers above `LARGEST_KEPT_BYTES` are still returned
    at once.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


def return_freed_memory() -> None:
    """Return all free memory to the system.

    Called after a shard is closed. Otherwise its weights leave holes between small objects, into
    which the weights of the next shard do not fit, and the process grows to more than twice its
    shard. On a GPU it also makes room for libraries that allocate outside of PyTorch and for other
    processes.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a GPU.

    The sum of the driver's free bytes and the unused bytes of PyTorch's allocator, which reuses
    them or releases them before it fails.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
