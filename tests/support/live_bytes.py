"""Counts of the bytes of live tensors, operation by operation.

Only a GPU has an allocator that reports its peak, but the tensors that live together are the same
on every device. Workspaces inside an operation (LAPACK's, cuSOLVER's) are not seen.
"""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations make while it is active.

    Earlier tensors count from the first operation that reads them.
    """

    def __init__(self):
        super().__init__()
        self._alive = {}
        self.peak = 0
        """Peak of the bytes alive together."""
        self.at = ""
        """The operation after which the peak was reached."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, found)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._alive[ref.cdata] = (ref, storage.nbytes())
        now = self.now
        if now > self.peak:
            self.peak, self.at = now, str(func)
        return found

    @property
    def now(self):
        """Bytes alive now."""
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        return sum(size for _, size in self._alive.values())
