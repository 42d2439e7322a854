"""Planned checkpoint: the tensors of a plan, read from storage before any file is written."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from orchestrator.device.transport import CPU, upload
from orchestrator.models.checkpoint.layout import GUARD, FileSpec, TensorSpec, make_guard
from orchestrator.models.checkpoint.weights import Checkpoint
from orchestrator.store.places import Place


class PlannedCheckpoint:
    """Tensors of a layout, equal to those of the written checkpoint.

    Args:
        dense: The checkpoint that the plan was made for.
        read: Returns every tensor in its shape, on any device and in any dtype, copies of dense
            tensors included, as for `checkpoint.write_file`.
    """

    def __init__(
        self, dense: Checkpoint, files: Sequence[FileSpec], read: Callable[[TensorSpec], Tensor]
    ) -> None:
        self.directory: Place = dense.directory
        self.fingerprint: str = dense.fingerprint
        self.size_bytes: int = sum(file.size_bytes for file in files)
        """Total size of the tensors, without headers."""
        self._dense = dense
        self._read = read
        self._specs = {spec.name: spec for file in files for spec in file.tensors}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name].torch_dtype

    def origin(self, name: str) -> None:
        """Return None: every tensor has its own name."""

    def are_equal(self, one: str, other: str) -> bool:
        """Compare two copies of dense tensors; see `Headers`."""
        return self._dense.are_equal(self._specs[one].source, self._specs[other].source)

    def read_ahead(self, names: Iterable[str]) -> None:
        """No-op: only `read` knows the origin of the tensors."""

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """Read a tensor to a device and cast it there to the dtype in which it will be written."""
        spec = self._specs[name]
        if spec.part == GUARD:
            return upload(make_guard(spec, self._specs.values()), device)
        return upload(self._read(spec), device).to(spec.torch_dtype)
