"""Reads of a unit's stored factors and entries, cut by a prefix.

Shape suffixes: O outputs, I inputs, R rank, N entries.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.device.transport import CPU, upload
from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.models.forms.index_codes import encode
from orchestrator.plan.linear import Linear


def read_factor(path: Path, part: str, rank: int, outputs: range, suffix: str = "") -> Tensor:
    """One factor at a rank, the first rows of what is stored, rows being ranks in both.

    On the CPU; `weight` is a transposed view, to be made contiguous on the device that needs it.
    Linears that share a basis have their outputs stored together; `outputs` are this linear's.
    """
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(part + suffix)
        if part == "down":
            down_RI: Tensor = stored[:rank]
            return down_RI
        rows_RO: Tensor = stored[:rank, outputs.start : outputs.stop]
        return rows_RO.T


def read_sparse(
    path: Path, tensor: TensorSpec, linear: Linear, device: torch.device = CPU
) -> Tensor:
    """Values or index of the most important entries, which stand first, by ascending position.

    Sorted on `device`, which also holds the result.
    """
    with safe_open(path, framework="pt") as file:
        stored = upload(file.get_slice("positions")[: tensor.nonzeros], device)
        positions_N, order_N = stored.sort()
        if tensor.part == "values":
            return upload(file.get_slice("values")[: tensor.nonzeros], device)[order_N]
    sizes = linear.out_features, linear.in_features
    return encode(tensor.code, positions_N, *sizes)[tensor.part]
