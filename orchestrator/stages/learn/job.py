"""Learning of the scores of directions, as a pipeline over the shards: the driver's part."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.allocate.gates.threshold_path import ThresholdPath, path_curve
from orchestrator.models.training.gate_scores import num_directions
from orchestrator.models.training.path_gates import PathSettings, PathTask
from orchestrator.runtime.resume import reusable_units
from orchestrator.stages.context.decompose import compression_task
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.values import Decomposed, Dividing, Scores
from orchestrator.stages.context.worker.orders import read_scores
from orchestrator.stages.learn.schedule import Counts, LearnPipeline
from orchestrator.stages.learn.steps import LEARN_VERSION, GateSteps
from orchestrator.stages.learn.worker import LearnSettings, snapshot_gains_key
from orchestrator.store.units import unit_key


class Learning(GateSteps):
    """Scores of all directions of all linears, a unit for each block; see `allocate.gates.learned`.

    The model is the dense one with gates. The keys of the units hold neither a size nor a plan, so
    any other size finds them.

    Args:
        dividing: With the curves of the decompositions.
    """

    def __init__(self, job: Decomposed, allocator: GateAllocator, dividing: Dividing) -> None:
        options = {"options": allocator.decisive(), "seed": job.randomness.seed}
        self._dividing = dividing
        inputs = [job.pass_key, *job.block_keys.values()]
        self._gates = {
            each.name: count
            for each in job.linears
            if (count := num_directions(each, job.form, allocator.adapters))
        }
        blocks = sorted({each.block for each in job.linears if each.name in self._gates})
        key = unit_key("learn", LEARN_VERSION, inputs, **options)
        super().__init__(job, allocator, key=key, blocks=blocks, of="learn")

    @property
    def task(self) -> CompressionTask:
        """The task of the workers."""
        settings = LearnSettings(
            options=self._course.options,
            penalty_by=self._allocator.penalty_by,
            tail=self._allocator.tail,
            adapters=self._allocator.adapters,
            randomness=self._job.randomness,
            gates=self._allocator.gates,
            keys=self.keys,
            target_keys=self._target_keys,
            path=self._path(),
        )
        return compression_task(self._job, pass_key=self._key, settings=settings)

    @cached_property
    def _followed(self) -> GateAllocator:
        given = self._dividing
        tokens = sum(tokens for tokens, _ in self._lengths)
        return self._allocator.begin(given.linears, given.curves, self._job.form, tokens)

    def _path(self) -> PathTask | None:
        """Curves of the gates of a path, and its settings; None if there is no path."""
        allocator, job = self._allocator, self._job
        if allocator.gates != "thresholds":
            return None
        assert isinstance(allocator, ThresholdPath)
        lengths, curves = [tokens for tokens, _ in self._lengths], self._dividing.curves
        learned = sum(lengths) - sum(lengths[each] for each in self._course.held_out)
        sequences = len(lengths) - len(self._course.held_out)
        settings = PathSettings(
            gains=allocator.snapshot_gains,
            prior=allocator.prior,
            memory=allocator.memory,
            tokens=learned,
            step_tokens=learned / sequences * min(allocator.batch, sequences),
        )
        total = sum(lengths)
        gated = [each for each in job.linears if each.name in self._gates]
        named = {e.name: path_curve(e, curves[e.name], job.form, total) for e in gated}
        return PathTask(named, settings)

    def _gain_keys(self, done: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
        """Keys of the gains that the size takes of a learning that is committed, by block; none if
        they are those of the start."""
        if not (self._allocator.snapshot_gains and done):
            return {}
        step = self._nearest(done)["step"]
        return {block: snapshot_gains_key(self._key, step, block) for block in self.keys if step}

    def _nearest(self, done: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any]:
        """Snapshot of a learning that is committed nearest to the size, the larger one of two."""
        snapshots, wanted = next(iter(done.values()))["snapshots"], self._job.budget.kept
        nearest: Mapping[str, Any] = min(snapshots, key=lambda each: abs(each["kept"] - wanted))
        return nearest

    def _has_gains(self, keys: Mapping[int, str], stage: RunningStage) -> bool:
        """Test if the gains of a snapshot are whole."""
        units, workers, monitor = self._job.run.units, stage.workers, stage.monitor
        found = reusable_units(
            units, keys, workers, monitor, stage="learning", called="gains of block {}"
        )
        return found.keys() == keys.keys()

    def learn(self, stage: RunningStage) -> Scores:
        """Learn the scores that no reusable unit has; gives all of them.

        Raises:
            InputError: A loss or a gradient is not finite.
            InfeasibleError: As `GateAllocator.check_reached`.
        """
        job, done = self._job, self.committed(stage)
        is_done = done.keys() == self.keys.keys()
        if not is_done or not self._has_gains(self._gain_keys(done), stage):
            self.perform(stage, done)
        learned = {
            name: each
            for key in self.keys.values()
            for name, each in read_scores(job.run, key).items()
        }
        gains = self._gains(done)
        report = {"learn": self._report(done, gains)}
        return Scores(report=report, learned=learned, orders=self.keys, gains=gains)

    def _gains(self, done: Mapping[int, Mapping[str, Any]]) -> Mapping[int, str]:
        """Keys of the gains that the size takes, by block."""
        if self._allocator.gain_budget(self._job.budget.kept) is not None:
            return self.keys
        return self._gain_keys(done)

    def _report(
        self, done: Mapping[int, Mapping[str, Any]], gains: Mapping[int, str]
    ) -> dict[str, Any]:
        """Facts of the learning and of the gains that the size takes."""
        allocator, facts = self._allocator, dict(next(iter(done.values()), {}))
        if facts:
            allocator.check_reached(facts["kept"], self._job.budget)
        if allocator.adapters:
            facts["adapters"] = allocator.adapters
        if allocator.gates == "polarised" or allocator.snapshot_gains:
            facts["gains"] = bool(gains)
        if allocator.snapshot_gains and gains:
            facts["gains_of"] = self._nearest(done)["kept"]
        return facts

    def _kept(self, counts: Counts) -> float:
        """Kept fraction of values, if the linears store what their gates leave open."""
        values = dense = 0
        for linear in self._job.linears:
            dense += linear.values
            open_directions, has_tail = counts.get(linear.name, (0, True))
            rank = max(open_directions, 1) + self._allocator.adapters
            factors = self._job.form.factor_values(linear, rank)
            values += linear.values if has_tail else min(factors, linear.values)
        return values / dense

    def _facts(self, pipeline: LearnPipeline) -> dict[str, Any]:
        """Facts of the learning, the same for two equal runs."""
        counts = pipeline.counts
        gates = sum(self._gates.values()) + len(self._gates)
        is_open = sum(directions + has_tail for directions, has_tail in counts.values())
        return {
            "steps": pipeline.step,
            "stop": pipeline.stop,
            "kept": pipeline.sizes[pipeline.step],
            "gates": gates,
            "open": is_open,
            "closed": gates - is_open,
            "emptied": [name for name in self._gates if counts.get(name, (1, True)) == (0, False)],
            "snapshots": [
                {**asdict(each), "kept": pipeline.sizes[each.step]} for each in pipeline.snapshots
            ],
        }
