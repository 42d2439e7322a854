"""What is stored of a pruned weight and of the factors beside it, and what it gives.

Shape suffixes: O outputs, I inputs, R rank, N entries.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from orchestrator.allocate.two_sided_sparse import Surface
from orchestrator.device.transport import upload
from orchestrator.linalg.fit_entries import fit_entries, second_moment_of
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
    Where entries are to be fitted, the correlations of both statistics too.
    """
    stored = {
        "dense": result.weight_OI,
        "curvature": result.curvature_O,
        "square": result.square_I,
    }
    if result.correlations is not None:
        names = "curvature.correlations", "square.correlations"
        stored |= dict(zip(names, result.correlations, strict=True))
    for nonzeros, (weight_OR, down_RI) in result.factors.items():
        stored[f"weight.{nonzeros}"] = weight_OR.T.to(dtype)
        stored[f"down.{nonzeros}"] = down_RI.to(dtype)
    return stored


def read_entries(
    path: Path, nonzeros: int, rank: int, device: torch.device, *, steps: int
) -> tuple[Tensor, Tensor]:
    """The most important entries by ascending position: values, and positions in int64, [N].

    Fitted in so many steps to what the factors of this rank leave of the weight, as those are
    stored; with none they are the weight's own.
    """
    with safe_open(path, framework="pt") as file:

        def read(name: str) -> Tensor:
            return upload(file.get_tensor(name), device)

        weight_OI, curvature_O, square_I = map(read, ("dense", "curvature", "square"))
        positions_N = entry_order(weight_OI, curvature_O, square_I)[:nonzeros].sort().values
        values_N = weight_OI.flatten()[positions_N]
        if not steps:
            return values_N.cpu(), positions_N.cpu()
        rest_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32), copy=True)
        rest_OI.view(-1)[positions_N] = 0
        if rank:
            weight_RO, down_RI = (read(f"{part}.{nonzeros}")[:rank] for part in ("weight", "down"))
            rest_OI -= weight_RO.T.to(rest_OI) @ down_RI.to(rest_OI)
        curvature_OO = second_moment_of(curvature_O, read("curvature.correlations"))
        moment_II = second_moment_of(square_I, read("square.correlations"))
    step_N = fit_entries(rest_OI, positions_N, curvature_OO, moment_II, steps=steps)
    return (values_N + step_N).to(values_N.dtype).cpu(), positions_N.cpu()
