"""Schedule of training over shards, driven by a simulated pool without Ray and tensors."""

import math
import random

import pytest

from orchestrator.models.training.train_options import TrainOptions, plan_course
from orchestrator.randomness import Randomness
from orchestrator.stages.context.pipeline.program import program
from orchestrator.stages.context.pipeline.schedule import WINDOW, Pipeline
from orchestrator.stages.context.pipeline.snapshot import Snapshot

SEQUENCES = 11
LENGTHS = [(20 + i, 19 + i) for i in range(SEQUENCES)]
OPTIONS = TrainOptions(epochs=3, batches=3, every=2, patience=100, held_out=0.2)


def some_losses(state, sequence):
    """Losses that depend on all earlier operations on the state."""
    return {"divergence": (hash((state, sequence)) % 997) / 100, "cross_entropy": sequence / 7}


class SimulatedWorker:
    """State of one worker: its blocks' states, which are the gradients that they have applied."""

    def __init__(self):
        self.blocks, self.state, self.entered, self.gradient = None, {}, {}, []


class SimulatedPipeline:
    """Perform a pipeline's calls in a random order, and check each against the rules. A block's
    state is the list of its updates, each with the sequences that made it: two shards with states
    of different steps are detected when a sequence passes both."""

    def __init__(
        self,
        workers,
        *,
        options=OPTIONS,
        num_blocks=7,
        seed=0,
        loss=0.0,
        replaced=1.0,
        keeps_states=True,
    ):
        self.course = plan_course(options, SEQUENCES, Randomness(0))
        self.pipeline = Pipeline(
            self.course, LENGTHS, num_blocks=num_blocks, keeps_states=keeps_states
        )
        self.best = {}
        self.num_blocks = num_blocks
        self.workers = {number: SimulatedWorker() for number in range(workers)}
        self.rng, self.loss, self.replaced = random.Random(seed), loss, replaced
        self.snapshots = {(0, block): () for block in range(num_blocks)}
        self.records, self.results, self.passed = {}, {}, []
        self.lost = 0

    def run(self, limit=200_000):
        busy, schedule = [], self.pipeline
        for _ in range(limit):
            if schedule.finished:
                return self
            idle = [w for w in self.workers if w not in {call.worker for call in busy}]
            calls = schedule.calls(idle)
            assert len({call.worker for call in calls}) == len(calls)
            for call in calls:
                busy.append(call)
                record = self.records.pop(call.takes, None) if call.takes else None
                assert (record is None) == (call.takes is None), "took what is not there"
                self.start(call, record)
            self.records = {k: r for k, r in self.records.items() if schedule.is_awaited(k)}
            assert busy, "nothing runs and nothing is finished"
            call = busy.pop(self.rng.randrange(len(busy)))
            if self.rng.random() < self.loss:
                self.lose(call)
            else:
                value, record = self.results.pop(call.worker)
                schedule.succeeded(call)
                schedule.record_result(call, value)
                if call.emits and schedule.is_awaited(call.emits):
                    self.records[call.emits] = record
        raise AssertionError("the schedule does not come to an end")

    def start(self, call, record):
        """Compute the result of a call at its start; only its end may be late."""
        worker = self.workers[call.worker]
        act = getattr(self, call.method)
        self.results[call.worker] = act(worker, record, **call.command.keywords())

    def lose(self, call):
        self.lost += 1
        self.results.pop(call.worker)
        del self.workers[call.worker]
        if self.rng.random() < self.replaced or not self.workers:
            self.workers[max([call.worker, *self.workers]) + 1] = SimulatedWorker()
        self.pipeline.lost(call)

    def take(self, worker, record, blocks, step):
        worker.__init__()
        worker.blocks = range(*blocks)
        worker.state = {b: self.snapshots[step, b] for b in worker.blocks}
        return None, None

    def enter(self, worker, record):
        """States that a sequence has passed through, this shard's last."""
        assert (record is None) == (worker.blocks.start == 0)
        return (*(record or ()), *worker.state.values())

    def forward(self, worker, record, serial, sequence):
        assert serial not in worker.entered
        worker.entered[serial] = sequence
        shards = [each.blocks for each in self.workers.values() if each.blocks]
        assert len(worker.entered) <= len(shards)
        return None, self.enter(worker, record)

    def turn(self, worker, record, serial, sequence, divergence, cross_entropy, is_last):
        states = self.enter(worker, record)
        assert len(states) == self.num_blocks
        assert len(set(states)) == 1, "blocks of different steps"
        worker.gradient.append(sequence)
        self.passed.append((len(states[0]) + 1, sequence))
        norms = {"norms": {b: 0.25 + b for b in worker.blocks}} if is_last else {}
        return {"losses": some_losses(states[0], sequence)} | norms, sequence

    def backward(self, worker, record, serial, is_last):
        sequence = worker.entered.pop(serial)
        assert record == sequence
        worker.gradient.append(sequence)
        return ({"norms": {b: 0.25 + b for b in worker.blocks}} if is_last else {}), sequence

    def update(self, worker, record, step, scale, rate):
        norm = math.sqrt(sum(0.25 + b for b in range(self.num_blocks)))
        assert scale == pytest.approx(min(1, 1 / norm), rel=1e-5)
        assert rate == self.course.rate(step - 1)
        assert tuple(worker.gradient) == self.course.batches[step - 1], "another order"
        assert not worker.entered
        for block, state in worker.state.items():
            assert len(state) == step - 1
            worker.state[block] = (*state, tuple(worker.gradient))
        worker.gradient = []
        return None, None

    def evaluate(self, worker, record, serial, sequence):
        states = self.enter(worker, record)
        assert len(set(states)) == 1
        waiting = sum(boundary == worker.blocks.stop for boundary, _ in self.records)
        assert waiting < WINDOW
        if len(states) == self.num_blocks:
            return {"losses": some_losses(states[0], sequence)}, None
        return None, states

    def snapshot(self, worker, record, step):
        for block, state in worker.state.items():
            assert len(state) == step
            self.snapshots[step, block] = state
        return None, None

    def keep(self, worker, record, step, is_best):
        for block, state in worker.state.items():
            assert len(state) == step
            if is_best:
                self.best[block] = state
        return None, None


@pytest.fixture(scope="module")
def alone():
    """Result of one worker without failures."""
    simulation = SimulatedPipeline(1).run()
    assert sorted(simulation.passed) == sorted(
        (step, each) for step, batch in enumerate(simulation.course.batches, 1) for each in batch
    )
    return simulation


@pytest.mark.parametrize("workers", [2, 3, 7, 9])
@pytest.mark.parametrize("seed", range(3))
def test_every_number_of_workers_finds_the_same(workers, seed, alone):
    """Every sequence passes once per step, in one order; losses and states are the same."""
    simulation = SimulatedPipeline(workers, seed=seed).run()
    assert simulation.pipeline.snapshots == alone.pipeline.snapshots
    assert simulation.snapshots == alone.snapshots
    assert simulation.passed == alone.passed


@pytest.mark.parametrize("seed", range(40))
def test_losses_of_workers_change_nothing(seed, alone):
    """After any loss, with or without replacement, all go back and compute the same again."""
    workers, replaced = 1 + seed % 5, (0.0, 0.5, 1.0)[seed % 3]
    simulation = SimulatedPipeline(workers, seed=seed, loss=0.02, replaced=replaced).run()
    assert simulation.pipeline.snapshots == alone.pipeline.snapshots
    assert simulation.snapshots == alone.snapshots


@pytest.mark.parametrize("seed", range(12))
def test_without_states_all_begin_again_and_the_best_is_kept(seed, alone):
    """Shards resume only from the start, and finally have the values of the best step."""
    workers, replaced = 1 + seed % 5, (0.0, 0.5, 1.0)[seed % 3]
    simulation = SimulatedPipeline(
        workers, seed=seed, loss=0.001, replaced=replaced, keeps_states=False
    )
    pipeline = simulation.run().pipeline
    assert pipeline.snapshots == alone.pipeline.snapshots
    assert {step for step, _ in simulation.snapshots} == {0}
    step = pipeline.best.step
    assert 0 < step < pipeline.snapshots[-1].step
    assert simulation.best == {block: alone.snapshots[step, block] for block in range(7)}


def test_an_earlier_run_is_resumed(alone):
    """From the snapshots found, the rest follows as in an uninterrupted run."""
    simulation = SimulatedPipeline(3)
    half = alone.pipeline.snapshots[:3]
    simulation.snapshots = dict(alone.snapshots)
    course = simulation.course
    simulation.pipeline = Pipeline(course, LENGTHS, num_blocks=7, snapshots=half)
    simulation.run()
    assert simulation.pipeline.snapshots == alone.pipeline.snapshots
    assert min(step for step, _ in simulation.passed) == half[-1].step + 1


@pytest.mark.parametrize("keeps_states", [True, False])
def test_who_comes_later_is_used_from_the_next_snapshot_on(keeps_states):
    """The cut follows the number of workers, between groups; without states it is constant."""
    simulation = SimulatedPipeline(2)
    pipeline = Pipeline(
        simulation.course, LENGTHS, num_blocks=7, group=2, keeps_states=keeps_states
    )
    simulation.pipeline = pipeline
    cuts = []
    calls = pipeline.calls

    def watched(idle):
        found = calls(idle)
        if not cuts or cuts[-1] != pipeline.cut:
            cuts.append(pipeline.cut)
        if len(pipeline.snapshots) == 2:
            simulation.workers.setdefault(9, SimulatedWorker())
        return found

    pipeline.calls = watched
    simulation.run()
    expected = [[range(4), range(4, 7)], [range(4), range(4, 6), range(6, 7)]]
    assert cuts == (expected if keeps_states else expected[:1])


def test_all_shards_are_busy_in_between():
    """One forward, one backward: the first shard is ahead by the number of later shards."""
    kinds = [
        [move.kind[0] for move in program(shard, 3, [(1, (5, 6, 7, 8))], ())] for shard in range(3)
    ]
    assert ["".join(each) for each in kinds] == ["fffbfbbbus", "ffbfbfbbus", "ttttus"]


def test_patience_ends_it():
    """Training ends after the given number of snapshots without improvement."""
    options = TrainOptions(epochs=50, batches=3, every=2, patience=3, held_out=0.2)
    pipeline = SimulatedPipeline(2, options=options).run().pipeline
    assert pipeline.stop == "patience"
    steps = [each.step for each in pipeline.snapshots]
    assert steps[-1] - pipeline.best.step == 3 * 2
    assert pipeline.best.held_out == min(each.held_out for each in pipeline.snapshots)


def test_patience_begins_when_no_weights_are_mixed_any_more():
    """Snapshots before the end of the mixed steps do not count."""
    given = {"epochs": 50, "batches": 3, "every": 2, "patience": 3, "held_out": 0.2}
    pipeline = SimulatedPipeline(2, options=TrainOptions(mixed=0.4, **given)).run().pipeline
    assert pipeline.stop == "patience"
    assert pipeline.best.step < 60
    assert pipeline.snapshots[-1].step == 60 + 3 * 2


def test_a_gradient_that_is_no_number_ends_it():
    """No shard steps then; earlier results are kept."""
    simulation = SimulatedPipeline(3)
    inner = simulation.turn

    def broken(worker, record, **fields):
        value, emitted = inner(worker, record, **fields)
        if "norms" in value and len(simulation.passed) > 9:
            value["norms"][6] = math.nan
        return value, emitted

    simulation.turn = broken
    pipeline = simulation.run().pipeline
    assert pipeline.stop == "diverged"
    assert all(math.isfinite(each.held_out) for each in pipeline.snapshots)
    assert isinstance(pipeline.best, Snapshot)
