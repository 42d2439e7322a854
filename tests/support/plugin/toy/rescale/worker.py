"""The workers' half: a command of its own, and the files with the scaled values."""

import math
from dataclasses import dataclass

from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.trained_units import TrainedUnits
from orchestrator.stages.context.worker.open_shard import DenseModel
from orchestrator.stages.context.worker.stored import Decompositions
from orchestrator.stages.context.worker.trained_worker import CompressedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RescaleSettings:
    """Settings of the workers."""

    units: TrainedUnits
    largest: float


class RescaleWorker(Worker):
    """Scales the diagonals of one block at a time."""

    def __init__(self, task):
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task, self.settings = task, task.settings
        dense = DenseModel(task, self.run, self.device)
        self.compressed = CompressedModel(self, task, dense, self.settings.units)
        self.stored = Decompositions(task, self.run, self.device)

    def rescale(self, block):
        """Scale the cut linears of a block by one factor each, and commit them."""
        tensors, factors = {}, {}
        for linear in self.task.linears:
            if (
                linear.block != block
                or self.settings.units.plan.assignments[linear.name].form == "dense"
            ):
                continue
            stored = self.stored.stored(linear)
            total, kept = (float(stored.whole(name).sum()) for name in ("total", "kept"))
            factors[linear.name] = min(math.sqrt(total / kept), self.settings.largest)
            tensors[f"{linear.name}.weight"] = stored.whole("diagonal") * factors[linear.name]
        facts = {"factors": factors}
        self.compressed.commit_block(block, tensors, facts)
        return facts

    def write(self, file, choice=""):
        """Write one file of the checkpoint, with the scaled diagonals."""
        return self.compressed.after.write(file, self.task.out)
