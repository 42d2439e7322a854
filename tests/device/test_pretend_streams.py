"""Streams and pinned memory of the simulated CUDA device: a missing wait is an error."""

import threading

import pytest
import torch
from pretend import CUDA, pretended_device


@pytest.fixture
def device():
    """A simulated device for the test."""
    with pretended_device() as found:
        yield found


def test_pinned_memory_and_streams(device):
    """Copies say whether their host buffer is pinned, and in which stream they are."""
    side = torch.cuda.Stream()
    buffer = torch.empty(8, pin_memory=True)
    with torch.cuda.stream(side):
        found = buffer[:4].to(CUDA, non_blocking=True)
        event = side.record_event()
    torch.cuda.current_stream().wait_event(event)
    found.record_stream(torch.cuda.current_stream())
    assert (found + 1).is_cuda
    assert buffer.is_pinned()
    assert torch.ones(2).pin_memory().is_pinned()
    assert not torch.ones(2).is_pinned()
    (copy,) = device.copies
    assert copy.pinned
    assert copy.non_blocking
    assert copy.stream == side.number != torch.cuda.default_stream().number
    asked = [(call.operation, call.stream) for call in device.stream_calls]
    assert asked == [("record_event", side.number), ("wait_event", 0), ("record_stream", 0)]
    with pytest.raises(RuntimeError, match="cannot pin"):
        found.pin_memory()


def test_streams_wait_for_each_other(device):
    """Reads wait for writes of another stream, writes for its reads and writes."""
    weight = torch.ones(8, device=CUDA) * 2
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        with pytest.raises(RuntimeError, match="stream 1 reads what stream 0 writes"):
            weight + 1  # made before the stream
        side.wait_stream(main)
        found = weight + 1
    with pytest.raises(RuntimeError, match="stream 0 reads what stream 1 writes"):
        found + 1
    main.wait_event(side.record_event())
    found + 1
    with torch.cuda.stream(side):
        with pytest.raises(RuntimeError, match="stream 1 writes what stream 0 reads"):
            found.zero_()
        side.wait_stream(main)
        found.zero_()
    torch.cuda.synchronize()
    assert (found + weight)[0].item() == 2


@pytest.mark.parametrize("records", [False, True])
def test_memory_of_another_stream_is_recorded(records, device):
    """Freed memory is reused after other streams' reads alone: by `record_stream` or a wait."""
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        found = torch.ones(8).pin_memory().to(CUDA, non_blocking=True)
    main.wait_stream(side)
    total = found + 1
    if records:
        found.record_stream(main)
    del found
    with torch.cuda.stream(side):
        if not records:
            with pytest.raises(RuntimeError, match="memory that stream 0 uses"):
                torch.ones(8, device=CUDA)
        side.wait_stream(main)
        torch.ones(8, device=CUDA)
    assert total[0].item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_values_arrive_when_the_host_has_waited(dtype, device):
    """A non-blocking copy to pinned memory shows no values before the host has waited."""
    values = torch.tensor([1, 0, 1]).to(dtype)
    source, buffer = values.cuda(), torch.empty(3, dtype=dtype, pin_memory=True)
    buffer.copy_(source, non_blocking=True)
    by_to, event = source.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    assert not torch.equal(buffer, values)
    assert not torch.equal(by_to, values)
    event.synchronize()
    assert torch.equal(buffer, values)
    assert torch.equal(by_to, values)


def test_a_staging_buffer_is_not_filled_again_too_early(device):
    """Overwriting the source of a non-blocking copy before the host has waited is an error."""
    buffer = torch.ones(3, pin_memory=True)
    buffer.cuda(non_blocking=True)
    torch.cuda.current_stream().synchronize()
    buffer.numpy()[...] = 2
    buffer.cuda(non_blocking=True)
    buffer.numpy()[...] = 3
    with pytest.raises(RuntimeError, match="the source of a copy was written to before its end"):
        torch.cuda.current_stream().synchronize()


def test_threads_are_on_the_device_too(device):
    """A thread started inside makes and moves tensors too, with a current stream of its own."""
    found = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(torch.ones(3).to(CUDA))
            found.append(found[0].cpu())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [each.is_cuda for each in found] == [True, False]
    assert [copy.stream for copy in device.copies] == [1, 1]
    assert torch.cuda.current_stream().number == 0
