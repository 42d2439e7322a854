"""Host traffic of a GPU: no unnecessary reads of values, transpositions or casts."""

import threading

import numpy as np
import pytest
import torch
from families import _llama, write_model
from pretend import CUDA, TO_DEVICE, TO_HOST, on_host, pretended_device
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.device.transport import Departure, Pace, bring, upload
from orchestrator.linalg.low_rank import LowRank
from orchestrator.linalg.pivot import pivot
from orchestrator.methods.kinds.low_rank import LOW_RANK
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.shards.chunk import BlockState, Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.training.compensation import read_errors, squared_error
from orchestrator.models.training.distill import TopK, distill
from orchestrator.runtime.calls import Step
from orchestrator.runtime.worker import Task, Worker
from orchestrator.stages.context.worker.stored import host_tensors
from orchestrator.store.chunks import Chunks

pytestmark = pytest.mark.usefixtures("cuda_environment")

BLOCKS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of two blocks, stored in bfloat16."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(**_llama(num_hidden_layers=BLOCKS))
    write_model(lambda: LlamaForCausalLM(config), directory, dtype=torch.bfloat16)
    return directory


def some_chunks(padding):
    """Two sequences of 12 tokens."""
    tokens_BT = torch.arange(24).view(2, 12) * 7 % 96
    mask_BT = torch.ones(2, 12, dtype=torch.bool)
    mask_BT[:, 12 - padding :] = False
    return [Chunk(n, tokens_BT[n : n + 1], mask_BT[n : n + 1]) for n in range(2)]


def chunk_of(states_BTC, mask_BT):
    tokens_BT = torch.zeros(mask_BT.shape, dtype=torch.int64)
    return Chunk(0, tokens_BT, mask_BT, BlockState(states_BTC))


def on_gpu(chunk):
    """Copy of a chunk whose tensors are on the pretended device."""
    state = chunk.payload.map(lambda tensor: tensor.to(CUDA))
    return Chunk(chunk.index, chunk.tokens.to(CUDA), chunk.mask.to(CUDA), state)


def gathered(model, padding, device, pretended=None):
    """Statistics of a forward and backward pass; of a device, only the traffic in the pass."""
    lazy_model = LazyModel.open(model, dtype=torch.float32, device=device)
    with lazy_model.shard(range(BLOCKS)) as shard:
        options = {"magnitudes": True, "curvature": True, "outputs": lambda _: True}
        calibration = Calibration(shard, shard.linears, lambda *_: "input", **options)
        if pretended is not None:
            pretended.clear()
        for chunk in some_chunks(padding):
            calibration.backward(chunk, torch.ones_like)
        if pretended is not None:
            reads, copies = list(pretended.reads), list(pretended.copies)
            assert not pretended.conversions
        found = {}
        for linear in shard.linears:
            statistic = calibration.statistic(linear)
            assert statistic.curvature is not None
            tensors = statistic.matrix_II, statistic.magnitude_I, statistic.curvature.matrix_KK
            found[linear.name] = on_host(tensors) if pretended is not None else tensors
        calibration.close()
    return (found, reads, copies) if pretended is not None else found


@pytest.mark.parametrize("padding", [0, 3])
def test_a_pass_reads_nothing_for_a_linear(model, padding):
    """With Grams, magnitudes, curvature and cosines of every linear, with padding too, the host
    only waits for the model's own read of its mask, once a chunk. Copies are pinned, run beside the
    computation, and are not more for more linears. Bits are the CPU's."""
    expected = gathered(model, padding, torch.device("cpu"))
    with pretended_device() as device:
        found, reads, copies = gathered(model, padding, CUDA, device)
    assert {read.site.file for read in reads} <= {"models/shards/shard.py"}
    assert len(reads) <= 2 * len(some_chunks(padding))
    assert all(copy.pinned and copy.non_blocking and copy.stream for copy in copies)
    # tokens, mask and, with padding, the indices of real tokens
    assert len(copies) == 2 * (3 if padding else 2)
    assert all(
        torch.equal(*pair)
        for name in expected
        for pair in zip(expected[name], found[name], strict=True)
    )


def test_weights_cross_as_they_are_stored(model):
    """For a float32 shard of a bfloat16 checkpoint, its bytes on disk cross the bus once, pinned;
    the host neither casts them nor searches them for NaN."""
    stored = load_file(model / "model.safetensors")
    on_cpu = LazyModel.open(model, dtype=torch.float32)
    with pretended_device() as device, on_cpu.shard(range(BLOCKS)) as expected:
        lazy_model = LazyModel.open(model, dtype=torch.float32, device=CUDA)
        lazy_model._empty_model  # noqa: B018
        device.clear()
        with lazy_model.shard(range(BLOCKS)) as shard:
            assert not device.conversions
            loads = [copy for copy in device.copies if copy.site.file == "device/transport.py"]
            assert sum(copy.bytes for copy in loads) == sum(each.nbytes for each in stored.values())
            assert all(copy.pinned and copy.non_blocking for copy in loads)
            assert not any(copy.converted for copy in device.copies)
            # one read for each tensor, for NaN
            assert len(device.reads) <= len(stored)
            for name, parameter in shard.parameters().items():
                assert torch.equal(on_host(parameter), expected.parameters()[name])


@pytest.mark.parametrize("shape", [(), (3,), (5, 4), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_uploaded_is_contiguous_and_the_same(shape, turned, monkeypatch):
    """This holds for pieces that do not divide a tensor, and for transposed views."""
    monkeypatch.setattr("orchestrator.device.transport.PIECE_BYTES", 12)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensor = tensor.mT if turned and len(shape) == 2 else tensor
    assert upload(tensor, torch.device("cpu")).is_contiguous()
    with pretended_device() as device:
        found = upload(tensor, CUDA)
        assert found.device == CUDA
        assert found.is_contiguous()
        assert not device.conversions
        assert sum(copy.bytes for copy in device.copies) == tensor.nbytes
        assert not any(copy.converted for copy in device.copies)
        assert torch.equal(on_host(found), tensor)
        assert upload(found, CUDA) is found


def test_factors_are_turned_on_their_device():
    """Factors to be stored are copied from a GPU in the layout of the file."""
    parts = {"energies_K": torch.ones(3), "total": 3.0, "report": {}}
    factors = torch.randn(6, 3), torch.randn(3, 4)
    result = LowRank(weight_OR=factors[0], down_RI=factors[1], **parts)
    expected = host_tensors(LOW_RANK, result, torch.bfloat16)
    with pretended_device() as device:
        left, right = (each.to(CUDA) for each in factors)
        device.clear()
        result = LowRank(weight_OR=left, down_RI=right, **parts)
        found = host_tensors(LOW_RANK, result, torch.bfloat16)
        assert not device.conversions
        assert [copy.bytes for copy in device.copies] == [2 * 18, 2 * 12]
        assert not any(copy.converted for copy in device.copies)
    assert all(each.is_contiguous() for each in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_squared_error_is_that_of_the_real_tokens(padding, dtype):
    """It is numpy's float64 sum of squares over the tokens in the mask; values at other tokens do
    not matter, and the states stay unchanged."""
    generator = torch.Generator().manual_seed(0)
    found_BTC = torch.randn(1, 9, 16, generator=generator)
    target_BTC = torch.randn(1, 9, 16, generator=generator).to(dtype)
    mask_BT = torch.ones(1, 9, dtype=torch.bool)
    mask_BT[:, 9 - padding :] = False
    found_BTC[~mask_BT] = torch.nan
    found, target = chunk_of(found_BTC.to(dtype), mask_BT), chunk_of(target_BTC, mask_BT)
    before = [chunk.payload.output.clone() for chunk in (found, target)]
    count, total = read_errors({5: squared_error(found, target)})[5]
    one, other = (each.double()[mask_BT].numpy() for each in before)
    assert count == (9 - padding) * 16
    assert total == pytest.approx(float(np.square(one - other).sum()), rel=1e-13)
    for chunk, state in zip((found, target), before, strict=True):
        assert torch.equal(chunk.payload.output.nan_to_num(7), state.nan_to_num(7))


def test_errors_are_read_together_and_in_their_order():
    """The result has the numbers of each chunk by index, and is empty without chunks."""
    errors = {index: (index + 1, torch.tensor(index / 3, dtype=torch.float64)) for index in (4, 1)}
    assert read_errors(errors) == {4: (5, 4 / 3), 1: (2, 1 / 3)}
    assert list(read_errors(errors)) == [4, 1]
    assert read_errors({}) == {}


def test_the_walks_errors_take_one_read_for_all_chunks():
    """For any number of chunks, with padding too, no state is copied to the host."""
    states_BTC = torch.randn(1, 9, 16)
    mask_BT = torch.arange(9)[None] < 7
    expected = squared_error(chunk_of(states_BTC, mask_BT), chunk_of(states_BTC / 3, mask_BT))
    with pretended_device() as device:
        one, other = states_BTC.to(CUDA), (states_BTC / 3).to(CUDA)
        device.clear()
        pairs = [(chunk_of(one, mask_BT), chunk_of(other, mask_BT)) for _ in range(5)]
        found = read_errors({n: squared_error(*pair) for n, pair in enumerate(pairs)})
        assert len(device.reads) == 1
        assert not [copy for copy in device.copies if copy.direction == TO_HOST]
        assert not device.conversions
    assert set(found.values()) == {(expected[0], float(expected[1]))}


def test_losses_take_one_read_a_sequence():
    """Scores and distillation over many slices of tokens, with targets on the host, take one read a
    sequence or chunk, and give the CPU's numbers."""
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(1, 600, 8, generator=generator)
    tokens_BT = torch.randint(0, 8, (1, 600), generator=generator)
    mask_BT = torch.arange(600)[None] < 590
    targets = TopK.of(logits_BTV.roll(1, 1), 3, 1.0)
    case = tokens_BT, mask_BT
    expected = (
        score(*case, logits_BTV, None),
        distill(logits_BTV, *case, targets, temperature=1.0)[0],
    )
    with pretended_device() as device:
        on_device = logits_BTV.to(CUDA)
        device.clear()
        found = score(*case, on_device, None)
        assert [read.operation for read in device.reads] == ["tolist"]
        losses, _ = distill(on_device, *case, targets.to(CUDA), temperature=1.0)
        assert [read.operation for read in device.reads] == ["tolist", "tolist"]
        assert all(copy.direction == TO_DEVICE and copy.pinned for copy in device.copies)
    assert (found, losses) == expected


def test_what_leaves_waits_for_what_computes_and_is_waited_for():
    """A chunk is copied to pinned memory on a stream that first waits for the computing one; its
    memory is kept for that stream; the host waits only in `wait`."""
    states_BTC = torch.randn(1, 4, 3)
    chunk = chunk_of(states_BTC, torch.ones(1, 4, dtype=torch.bool))
    with pretended_device() as device:
        away = Departure()
        record = on_gpu(chunk).pack(away)
        (copy,) = [each for each in device.copies if each.bytes == states_BTC.nbytes][1:]
        assert (copy.direction, copy.pinned, copy.non_blocking) == (TO_HOST, True, True)
        assert copy.stream != 0
        calls = [(call.operation, call.stream) for call in device.stream_calls][-3:]
        wanted = ["wait_stream 0", "record_stream", "record_event"]
        assert calls == [(operation, copy.stream) for operation in wanted]
        away.wait()
        assert device.stream_calls[-1].operation == "synchronize_event"
        assert torch.equal(Chunk.unpack(record).payload.output, states_BTC)
        # without a departure the arrays are complete
        on_gpu(chunk).pack()
        assert device.stream_calls[-1].operation == "synchronize_event"


def test_what_comes_is_waited_for_by_what_computes():
    """A tensor is copied through pinned memory on a separate stream, for which the computing one
    waits; a pinned one is not copied on the host; one on the device is returned itself."""
    states_BTC = torch.randn(1, 4, 3)
    record = chunk_of(states_BTC, torch.ones(1, 4, dtype=torch.bool)).pack()
    with pretended_device() as device:
        for tensor in (states_BTC, Chunk.unpack(record, pinned=True).payload.output):
            device.clear()
            found = bring(tensor, CUDA)
            (copy,) = device.copies
            assert (copy.direction, copy.pinned, copy.non_blocking) == (TO_DEVICE, True, True)
            calls = [(call.operation, call.stream) for call in device.stream_calls]
            assert calls == [(f"wait_stream {copy.stream}", 0), ("record_stream", 0)]
            assert copy.stream != 0
            assert torch.equal(on_host(found), states_BTC)
        assert bring(found, CUDA) is found
    assert bring(states_BTC, torch.device("cpu")) is states_BTC


def test_the_host_is_one_step_ahead_at_most():
    """It waits for the last but one step before each step, and for none before the first two."""
    with pretended_device() as device:
        pace = Pace(CUDA)
        for expected in (["record_event"], ["record_event", "synchronize_event"]):
            device.clear()
            pace.step()
            assert [call.operation for call in device.stream_calls] == expected
    Pace(torch.device("cpu")).step()


def test_an_exchange_of_pivots_takes_one_read():
    """For any number of bands, reads are those without exchanges and one for each exchange. Bits
    and report are the CPU's."""
    few, many = [], []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight_OR = torch.randn(40 if seed < 6 else 700, 24, generator=generator)
        down_RI = torch.randn(24, 5, generator=generator)
        expected = pivot(weight_OR, down_RI)
        with pretended_device() as device:
            given = weight_OR.to(CUDA), down_RI.to(CUDA)
            device.clear()
            found = pivot(*given)
            reads = len(device.reads)
        assert found.report == expected.report
        for name in ("weight_SR", "down_RI", "order_O"):
            assert torch.equal(on_host(getattr(found, name)), getattr(expected, name))
        (few if seed < 6 else many).append((expected.report["exchanges"], reads))
    assert max(many)[0] > min(few)[0]
    assert len({reads - exchanges for exchanges, reads in few + many}) == 1


class PassingWorker(Worker):
    """Adds one to its input, and computes until the next input has been read."""

    def __init__(self, task):
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)

    def step(self, index, emit, record):
        chunk = self.input_chunk(2, index, record)
        states_BTC = bring(chunk.payload.output, self.device) + 1
        return threading.get_ident(), self.emit(4, chunk.with_payload(BlockState(states_BTC)))

    def next_inputs(self, index):
        return [(self.chunks, 2, index)]


@pytest.mark.parametrize("handed_over", [False, True])
def test_the_next_chunk_is_read_beside_a_step(handed_over, tmp_path, monkeypatch):
    """On a GPU another thread reads it from its file; not if chunks are handed over, nor on a CPU,
    with the same results. A chunk that is not stored yet is read in its own step."""
    read, readers = Chunks.read, {}

    def note(chunks, boundary, index):
        readers.setdefault(index, []).append(threading.get_ident())
        return read(chunks, boundary, index)

    monkeypatch.setattr(Chunks, "read", note)

    def passed(device, root):
        readers.clear()
        task = Task(run_dir=root, threads=1, pass_key="pass", fingerprints={})
        worker = PassingWorker(task)
        assert worker.device.type == device
        mask_BT = torch.ones(1, 4, dtype=torch.bool)
        records = [
            Chunk(n, mask_BT.long(), mask_BT, BlockState(torch.full((1, 4, 3), float(n)))).pack()
            for n in range(3)
        ]
        for index in range(2):
            worker.chunks.write(2, index, records[index])
        for index, following in ((0, 1), (1, 2), (2, None)):
            if index == 2:
                worker.flush_writes()
                worker.chunks.write(2, 2, records[2])
            given = records[index] if handed_over else None
            main, _ = worker.perform(Step(index, emit=True, next_index=following), given)
            worker._disk.submit(int).result()
        beside = {index: any(each != main for each in who) for index, who in readers.items()}
        found = [Chunk.unpack(read(worker.chunks, 4, n)).payload.output for n in range(3)]
        worker.release()
        return beside, found

    beside, expected = passed("cpu", tmp_path / "cpu")
    assert not any(beside.values())
    with pretended_device():
        beside, found = passed("cuda", tmp_path / "cuda")
    assert beside.get(1, False) is not handed_over
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert [float(each.mean()) for each in found] == [1.0, 2.0, 3.0]


def test_a_chunk_that_is_handed_over_has_arrived(tmp_path):
    """The record of a call is complete when the call ends; a chunk that is only stored is waited
    for by the thread that writes it."""
    with pretended_device() as device:
        worker = PassingWorker(Task(run_dir=tmp_path, threads=1, pass_key="pass", fingerprints={}))
        mask_BT = torch.ones(1, 4, dtype=torch.bool)
        record = Chunk(0, mask_BT.long(), mask_BT, BlockState(torch.zeros(1, 4, 3))).pack()
        for hand_over in (True, False):
            device.clear()
            worker.perform(Step(0, True, hand_over, 1), record)
            waits = [each.site for each in device.stream_calls if "synchronize" in each.operation]
            assert len(waits) >= hand_over
            worker.flush_writes()
            waits = [each.site for each in device.stream_calls if "synchronize" in each.operation]
            assert len(waits) > hand_over
        worker.release()
