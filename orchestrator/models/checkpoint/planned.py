"""A compressed checkpoint before any of it is written: the plan's tensors, from where they lie."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from orchestrator.device.transport import CPU, upload
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec
from orchestrator.models.checkpoint.weights import Checkpoint
from orchestrator.store.places import Place


class PlannedCheckpoint:
    """The tensors that `layout` announces; what writing them and opening the files would give.

    Args:
        dense: The checkpoint that the plan was made for.
        read: Gives every tensor in its shape, on any device and in any dtype, copies of dense ones
            too: what `checkpoint.write_file` would be given.
    """

    def __init__(
        self, dense: Checkpoint, files: Sequence[FileSpec], read: Callable[[TensorSpec], Tensor]
    ) -> None:
        self.directory: Place = dense.directory
        self.fingerprint: str = dense.fingerprint
        self.size_bytes: int = sum(file.size_bytes for file in files)
        """Of the tensors; headers come when it is written."""
        self._read = read
        self._specs = {spec.name: spec for file in files for spec in file.tensors}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name].torch_dtype

    def read_ahead(self, names: Iterable[str]) -> None:
        """Does nothing: where they come from is for `read` to know."""

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor on a device, cast there to the dtype in which it will be written."""
        spec = self._specs[name]
        return upload(self._read(spec), device).to(spec.torch_dtype)
