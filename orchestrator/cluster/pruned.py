"""What is stored of a pruned weight and of the factors beside it, and what it gives.

Shape suffixes: O outputs, I inputs, R rank, N entries.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.allocate.two_sided_sparse import Surface
from orchestrator.linalg.two_sided_sparse import SparseLowRank, entry_order


def surface_of(name: str, result: SparseLowRank) -> Surface:
    """What the driver learns of the losses."""
    mixes = result.mixes_P
    return Surface(
        name=name,
        nonzeros=np.array([mix.nonzeros for mix in mixes]),
        ranks=np.array([mix.rank for mix in mixes]),
        losses=np.array([mix.loss for mix in mixes]),
        activation_losses=np.array([mix.activation_loss for mix in mixes]),
        weight_losses=np.array([mix.weight_loss for mix in mixes]),
    )


def stored_pruned(result: SparseLowRank, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a unit holds: the weight as it is, diagonals, and factors with ranks as rows.

    The factors are in `dtype`; their names end in the number of entries that they stand beside.
    """
    stored = {
        "dense": result.weight_OI,
        "curvature": result.curvature_O,
        "square": result.square_I,
    }
    for nonzeros, (weight_OR, down_RI) in result.factors.items():
        stored[f"weight.{nonzeros}"] = weight_OR.T.to(dtype)
        stored[f"down.{nonzeros}"] = down_RI.to(dtype)
    return stored


def read_entries(path: Path, nonzeros: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The most important entries by ascending position: values, and positions in int64, [N]."""
    with safe_open(path, framework="pt") as file:
        names = ("dense", "curvature", "square")
        weight_OI, curvature_O, square_I = (file.get_tensor(name).to(device) for name in names)
    positions_N = entry_order(weight_OI, curvature_O, square_I)[:nonzeros].sort().values
    return weight_OI.flatten()[positions_N].cpu(), positions_N.cpu()
