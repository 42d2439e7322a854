"""Description of one tensor of a checkpoint."""

from dataclasses import dataclass
from typing import Literal

Region = Literal["front", "block", "tail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Tensor of a checkpoint with its names in the model and on disk."""

    name: str
    """Name in the model, `model.layers.3.mlp.down_proj.weight`."""
    disk_name: str
    """Name by which the checkpoint's view reads it, on disk or of one matrix of an expert."""
    shape: tuple[int, ...]
    dtype: str
    """Dtype on disk, `bfloat16`."""
    block: int | None
    """Index of its block; None outside the blocks."""
    place: Region
    """Region of the model: before the blocks, in a block, or after the blocks."""
    fused: tuple[str, tuple[int, ...]] | None = None
    """Name on disk and shape of the tensor that an expert's matrix is, or is a part of."""
