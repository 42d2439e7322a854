"""Description of one tensor of a checkpoint."""

from dataclasses import dataclass
from typing import Literal

Region = Literal["front", "block", "tail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of the checkpoint: its name in the model and its name on disk."""

    name: str
    """Module name, `model.layers.3.mlp.down_proj.weight`."""
    disk_name: str
    shape: tuple[int, ...]
    dtype: str
    """Dtype on disk, `bfloat16`."""
    block: int | None
    """Index of its block; None outside the blocks."""
    place: Region
    """Before the blocks, in one of them, or after them."""
