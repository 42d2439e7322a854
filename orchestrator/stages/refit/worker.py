"""The worker that fits left factors again, to the inputs that the compressed model itself makes.

Shape suffixes: O outputs, I inputs, R rank.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.device.transport import download, upload
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.low_rank import InputGram
from orchestrator.linalg.refit import refit
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration, as_dense, dense_weight
from orchestrator.plan.forms import FORMS
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.stages.context.compress_worker import CompressionTask, CompressionWorker

FITTED_FILE = "fitted.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitTask(CompressionTask):
    """What is needed beside what compression needs."""

    plan: Plan
    refit_keys: Mapping[int, str]
    """The key of the unit of left factors, by block; blocks without any have none."""

    def made_by(self, linear: Linear) -> list[str]:
        # a class with slots is another one than super() without arguments means
        return [*CompressionTask.made_by(self, linear), self.refit_keys[linear.block]]


class RefitWorker(CompressionWorker):
    """Calibrates the compressed model: its shards have the cut weights in the dense ones' places.

    All blocks see the inputs that the compressed blocks before them give, before any of those was
    fitted again, so that one pass serves all of them.
    """

    task: RefitTask

    def _gather(self, shard: Shard, todo: tuple[int, ...]) -> Calibration:
        linears = [each for each in self.task.linears if each.block in shard.blocks]
        for linear in filter(self._is_cut, linears):
            weight_OI = dense_weight(shard.module(linear.name))
            weight_OR, down_RI = (each.to(weight_OI) for each in self._factors(linear))
            torch.matmul(weight_OR, down_RI, out=weight_OI)
        wanted = [each for each in linears if each.block in todo and self._is_cut(each)]
        return Calibration(shard, wanted, lambda linear, site: "input")

    def _is_cut(self, linear: Linear) -> bool:
        return FORMS[self.task.plan.assignments[linear.name].form].is_factored

    def _factors(self, linear: Linear) -> tuple[Tensor, Tensor]:
        """Both factors as the plan cuts them."""
        rank = self.task.plan.assignments[linear.name].rank
        return self._factor(linear, "weight", rank), self._factor(linear, "down", rank)

    def _written(self, linear: Linear, part: str, rank: int) -> Tensor:
        if part != "weight":
            return super()._written(linear, part, rank)
        path = self.run.units.file(self.task.refit_keys[linear.block], FITTED_FILE)
        with safe_open(path, framework="pt") as file:
            rows_RO: Tensor = file.get_tensor(linear.name)
        return upload(rows_RO.T, self.device)

    def _dense(self, linear: Linear) -> Tensor:
        """The dense weight, read again: the shard has the cut one in its place."""
        assert self._shard is not None
        assert self._lazy_model is not None
        weight = self._lazy_model.load(f"{linear.name}.weight")
        return as_dense(self._shard.module(linear.name), weight)

    def finish(self, block: int) -> dict[str, Any]:
        """Fits the left factors of one block's linears and commits them in one file.

        Returns the unit's facts: seconds, and the reports of the fits that have one.
        """
        assert self._calibration is not None
        start = time.monotonic()
        self._free_for_finishing()
        fitted: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        for linear in self.task.linears:
            if linear.block != block or not self._is_cut(linear):
                continue
            weight_OR, down_RI = self._factors(linear)
            statistic = self._calibration.statistic(linear)
            assert isinstance(statistic, InputGram)
            eigen, given = Eigensolver(), (weight_OR, down_RI, statistic.matrix_II)
            fitted_OR = refit(self._dense(linear), *given, eigen=eigen)
            said |= {linear.name: eigen.report} if eigen.report else {}
            self._calibration.forget([linear])
            # ranks as rows, like everything that is stored of a linear
            fitted[linear.name] = download(fitted_OR.T.contiguous())
        facts = {"numerics": said, "timings": {"seconds": time.monotonic() - start}}
        unit = self.run.units.begin(self.task.refit_keys[block])
        with unit.file(FITTED_FILE) as path:
            save_file(fitted, path)
        unit.commit(environment=self.environment(), facts=facts)
        return facts
