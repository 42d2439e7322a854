"""Gradients of a step's slices as records that replicas send each other, and their sum.

Every replica receives every slice, float32: of a 70B block kept at 0.8 that is 2.7 GB a slice, in
the host's memory, where Ray puts it. The sum is made there too, in one pass over all slices: it
takes less of the host than copying them to a GPU would, to which the sum alone goes.

Shape suffixes: N values of a parameter.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from orchestrator.models.transport import download, fill
from orchestrator.store.chunks import Record

PIECE_VALUES = 2**17
"""Of the sum, what stays in a core's cache while all slices are added to it."""


def pack(part: int, gradients: Mapping[int, Tensor]) -> dict[str, np.ndarray]:
    """A slice's gradients, given by the parameters' places, as arrays to be sent."""
    return {f"{part}.{place}": download(each).numpy() for place, each in gradients.items()}


def merge_records(records: Sequence[Record], device: torch.device) -> dict[int, Tensor]:
    """The sum of slices' gradients, in the order of the slices, whoever made them; on `device`.

    The bits are those of `models.refine.merge`. On as many threads as PyTorch has: a value is added
    up by one of them, so their number changes no bit. Measured on one thread: 6.7 GB of slices a
    second where slice by slice it is 4.7.
    """
    slices: dict[int, dict[int, np.ndarray]] = {}
    for record in records:
        for name, array in record.items():
            part, place = map(int, name.split("."))
            slices.setdefault(place, {})[part] = array
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return {
            place: _summed([found[part] for part in sorted(found)], device, threads)
            for place, found in slices.items()
        }


def _summed(
    arrays: Sequence[np.ndarray], device: torch.device, threads: ThreadPoolExecutor
) -> Tensor:
    """((a + b) + c) + ..., in memory of its own; arrays may be read-only views of shared memory."""
    total = torch.empty(arrays[0].shape, dtype=getattr(torch, arrays[0].dtype.name), device=device)
    flat = [array.reshape(-1) for array in arrays]
    done = 0

    def add(buffer: memoryview) -> int:
        nonlocal done
        sum_N = np.frombuffer(buffer, dtype=arrays[0].dtype)
        parts = [array[done : done + len(sum_N)] for array in flat]

        def add_piece(start: int) -> None:
            piece = slice(start, start + PIECE_VALUES)
            np.copyto(sum_N[piece], parts[0][piece])
            for part in parts[1:]:
                np.add(sum_N[piece], part[piece], out=sum_N[piece])

        for _ in threads.map(add_piece, range(0, len(sum_N), PIECE_VALUES)):
            pass
        done += len(sum_N)
        return len(buffer)

    fill(total, add)
    return total
