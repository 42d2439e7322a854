"""Refining blocks in parallel, on the dense model's inputs: the driver's part."""

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.cluster.compress_worker import CompressionTask
from orchestrator.cluster.crew import Crew
from orchestrator.cluster.refine_worker import RefineTask, RefineWorker
from orchestrator.cluster.watch import Stage, Watch
from orchestrator.store.units import unit_key

if TYPE_CHECKING:
    from orchestrator.cluster.compress_job import Compression

REFINE_VERSION = 1
"""Raised when a trained tensor changes."""


class Refine:
    """One pass of dense chunks, and a unit of trained tensors for each block with a cut linear.

    Blocks do not wait for each other: each learns to give what its dense block gives on the dense
    model's own inputs. Published methods walk the blocks in order, each behind the compressed ones.
    """

    name: ClassVar[str] = "refine"
    worker_class: ClassVar[type[RefineWorker]] = RefineWorker

    def __init__(self, job: "Compression") -> None:
        self._job = job
        inputs = [job.pass_key, *job.block_keys.values(), *job.choice]
        self.key = unit_key(
            "refine",
            REFINE_VERSION,
            inputs,
            plan=job.plan.to_json(),
            options=asdict(job.refine_options),
            seed=job.recipe.seed,
        )
        """The name of what all blocks become."""
        forms = {name: assignment.form for name, assignment in job.plan.assignments.items()}
        blocks = sorted({each.block for each in job.linears if forms[each.name] != "dense"})
        self._keys = {
            block: unit_key("refined block", REFINE_VERSION, [self.key], block=block)
            for block in blocks
        }

    @property
    def task(self) -> RefineTask:
        """What the workers need to know."""
        job = self._job
        return RefineTask(
            **{field.name: getattr(job.task, field.name) for field in fields(CompressionTask)}
            | {"pass_key": self.key},
            plan=job.plan,
            options=job.refine_options,
            seed=job.recipe.seed,
            choice="".join(job.choice),
            refine_keys=self._keys,
        )

    def perform(self, crew: Crew, watch: Watch, stage: Stage) -> None:
        """Dense chunks flow through the shards; then each shard's blocks are trained."""
        passes = self._job.block_pass
        self._facts = passes.forward(self.key, self._keys, crew, watch, stage)

    @property
    def report(self) -> dict[str, Any]:
        """What training did to each block's error on the sequences that were held out."""
        blocks = {}
        for block, facts in sorted(self._facts.items()):
            losses = [facts["start"], *(epoch["held_out"] for epoch in facts["epochs"])]
            blocks[str(block)] = {
                "before": facts["start"],
                "after": losses[facts["best"]],
                "best_epoch": facts["best"],
                "steps": facts["steps"],
                "stop": facts["stop"],
            }
        return {
            "options": asdict(self._job.refine_options),
            "errors": "errors of linears are those before their blocks were refined",
            "blocks": blocks,
        }
