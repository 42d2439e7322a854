"""Worker that refits left factors to the inputs that the compressed model itself makes.

Shape suffixes: O outputs, I inputs, R rank.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.device.transport import download
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.low_rank import InputGram
from orchestrator.linalg.refit import refit
from orchestrator.methods.kinds.base import Factor
from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import as_dense, dense_weight
from orchestrator.plan.forms import DROPPED, FORMS
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.compress_worker import planned_tensors
from orchestrator.stages.context.worker.open_shard import DenseModel, PassSlot, StatisticsPass
from orchestrator.stages.context.worker.pivoted import commit_pivoted
from orchestrator.stages.context.worker.stored import Decompositions, StoredFile

FITTED_FILE = "fitted.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitSettings:
    """Settings of refitting left factors; the task has the keys of their units."""

    plan: Plan

    def is_cut(self, linear: Linear) -> bool:
        """Return True if the plan gives the linear factors."""
        return FORMS[self.plan.assignments[linear.name].form].is_factored

    def is_fitted(self, linear: Linear) -> bool:
        """Return True if the left factor is the linear's own."""
        form = FORMS[self.plan.assignments[linear.name].form]
        return form.is_factored and not form.shares_left


class RefittedFactors:
    """Source of the left factors that this stage has committed."""

    def __init__(
        self, worker: Worker, task: CompressionTask, decompositions: Decompositions
    ) -> None:
        self._worker, self._task, self._decompositions = worker, task, decompositions

    def read(self, tensor: TensorSpec) -> Tensor | None:
        if tensor.part != "weight":
            return None
        linear = self._task.linear(tensor.source)
        if not self._task.settings.is_fitted(linear):
            return None
        return self.factor(linear, "weight", tensor.rank)

    def factor(self, linear: Linear, part: Factor, rank: int) -> Tensor:
        """Return a factor as it is written to the checkpoint, on the device."""
        if part == "down":
            return self._decompositions.factor(linear, part, rank)
        worker = self._worker
        path = worker.run.units.file(self._task.refit_keys[linear.block], FITTED_FILE)
        return StoredFile(path, worker.device).whole(linear.name).T.contiguous()


class RefitWorker(Worker):
    """Calibrates the compressed model: its shards hold the cut weights in place of dense ones.

    All blocks see the inputs that the compressed blocks before them give, before any of those was
    refitted, so that one pass serves all of them.
    """

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.settings: RefitSettings = task.settings
        self.dense = DenseModel(task, self.run, self.device)
        self._decompositions = Decompositions(task, self.run, self.device)
        self._refitted = RefittedFactors(self, task, self._decompositions)
        planned = planned_tensors(self._decompositions, task, "")
        self._stored = replace(planned, sources=(self._refitted, *planned.sources))
        self._slot = PassSlot()

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Load a shard, cut its weights, and start the statistics of the blocks to do."""
        self._slot.close()
        opened = self.dense.open_with(range(*blocks), lambda shard: self._statistics(shard, todo))
        self._slot.put(StatisticsPass(self, opened, self.chunks))

    def _statistics(self, shard: Shard, todo: tuple[int, ...]) -> Calibration:
        linears = [each for each in self.task.linears if each.block in shard.blocks]
        for linear in filter(self.settings.is_cut, linears):
            weight_OI = dense_weight(shard.module(linear.name))
            weight_OR, down_RI = (each.to(weight_OI) for each in self._factors(linear))
            torch.matmul(weight_OR, down_RI, out=weight_OI)
        for linear in linears:
            if self.settings.plan.assignments[linear.name].form == DROPPED.name:
                for parameter in shard.module(linear.name).parameters():
                    parameter.zero_()
        fitted = filter(self.settings.is_fitted, linears)
        wanted = [each for each in fitted if each.block in todo]
        tokens = self.dense.tokens.ids.size
        return Calibration(shard, wanted, lambda linear, site: "input", tokens=tokens)

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the dense weights of later blocks into the system's cache."""
        self.dense.lazy.read_ahead(blocks)

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one chunk through the shard and into the statistics."""
        return self._slot.current.step(index, emit, record)

    def next_inputs(self, index: int) -> list[Stored]:
        return self._slot.next_inputs(index)

    def _factors(self, linear: Linear) -> tuple[Tensor, Tensor]:
        """Return both factors as the plan cuts them."""
        rank, factor = self.settings.plan.assignments[linear.name].rank, self._decompositions.factor
        return factor(linear, "weight", rank), factor(linear, "down", rank)

    def finish(self, block: int) -> dict[str, Any]:
        """Refit the left factors of one block's linears and commit them in one file.

        Returns the unit's facts: seconds, and the reports of the fits that have one.
        """
        opened = self._slot.current.opened
        start = time.monotonic()
        opened.settle()
        fitted: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        for linear in self.task.linears:
            if linear.block != block or not self.settings.is_fitted(linear):
                continue
            weight_OR, down_RI = self._factors(linear)
            statistic = opened.calibration.statistic(linear)
            assert isinstance(statistic, InputGram)
            eigen, given = Eigensolver(), (weight_OR, down_RI, statistic.matrix_II)
            # the dense weight is read again: the shard holds the cut one
            weight = self.dense.lazy.load(f"{linear.name}.weight")
            weight_OI = as_dense(opened.shard.module(linear.name), weight)
            fitted_OR = refit(weight_OI, *given, eigen=eigen)
            said |= {linear.name: eigen.report} if eigen.report else {}
            opened.calibration.forget([linear])
            # ranks as rows, as in all stored factors
            fitted[linear.name] = download(fitted_OR.T.contiguous())
        facts = {"numerics": said, "timings": {"seconds": time.monotonic() - start}}
        unit = self.run.units.begin(self.task.refit_keys[block])
        with unit.file(FITTED_FILE) as path:
            save_file(fitted, path)
        unit.commit(environment=self.environment(), facts=facts)
        return facts

    def pivot(self, name: str, rank: int) -> dict[str, Any]:
        """Convert a linear's refitted factors to pivoted storage; see `commit_pivoted`."""
        return commit_pivoted(self, self.task, self._refitted, (name, rank))

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint, with refitted left factors."""
        return self._stored.write(file, self.task.out)
