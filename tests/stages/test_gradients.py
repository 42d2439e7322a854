"""Exchange of gradient slices between replicas: the bits of a sum in one process."""

import pytest
import torch
from pretend import TO_DEVICE, TO_HOST, on_host, pretended_device

from orchestrator.models.training.refine import merge
from orchestrator.stages.context.gradients import PIECE_VALUES, merge_records, pack

CPU = torch.device("cpu")


def some_slices(dtype=torch.float32):
    """Gradients of four slices; one lacks a parameter, another has a single parameter."""
    generator = torch.Generator().manual_seed(5)
    shapes = {0: (3, PIECE_VALUES - 7), 1: (), 4: (5,), 7: (2 * PIECE_VALUES,)}
    reached = [{0, 1, 7}, {0, 1, 4, 7}, {1, 7}, {0, 1, 7}]
    return [
        {p: torch.randn(shapes[p], generator=generator, dtype=dtype) for p in sorted(places)}
        for places in reached
    ]


def sent(parts):
    """Record of slices as Ray returns it: read-only views."""
    slices, record = some_slices(), {}
    for part in parts:
        record |= pack(part, slices[part])
    for array in record.values():
        array.flags.writeable = False
    return record


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shares", [[[0, 1, 2, 3]], [[2, 3], [0, 1]], [[3], [1], [0], [2]]])
def test_the_sum_is_that_of_one_process(threads, shares):
    """Bits depend neither on the records of slices nor on threads; records are not changed."""
    expected, records = merge(some_slices()), [sent(parts) for parts in shares]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = merge_records(records, CPU)
    finally:
        torch.set_num_threads(before)
    assert found.keys() == expected.keys()
    for place, total in found.items():
        assert torch.equal(total, expected[place])
        total.zero_()
    for record, parts in zip(records, shares, strict=True):
        for name, array in sent(parts).items():
            assert (record[name] == array).all()


def test_the_order_is_that_of_the_slices():
    """The float32 sum 1e8 − 1e8 + 1 is 1; another order gives 0."""
    slices = [{0: torch.full((3,), value)} for value in (1e8, -1e8, 1.0)]
    records = [pack(part, slices[part]) for part in (2, 0, 1)]
    assert merge_records(records, CPU)[0].tolist() == [1, 1, 1]
    assert (torch.tensor(1e8) + (torch.tensor(-1e8) + 1.0)).item() == 0


def test_float64_stays():
    """Gradients in float64 are sent and added in float64."""
    (one,) = some_slices(torch.float64)[:1]
    found = merge_records([pack(0, one)], CPU)
    for place, gradient in one.items():
        assert torch.equal(found[place], gradient)
        assert found[place].dtype == torch.float64


def test_a_device_gives_its_slices_and_takes_the_sum_alone():
    """For any number of slices the bytes copied to a GPU are those of one; all copies are
    pinned."""
    slices = [{0: torch.randn(300, 200), 1: torch.randn(7)} for _ in range(4)]
    expected = merge([{place: each.clone() for place, each in one.items()} for one in slices])
    with pretended_device() as device:
        on_device = [{place: each.cuda() for place, each in one.items()} for one in slices]
        device.clear()
        records = [pack(part, one) for part, one in enumerate(on_device)]
        found = merge_records(records, torch.device("cuda"))
        sent = {
            way: [c for c in device.copies if c.direction == way] for way in (TO_HOST, TO_DEVICE)
        }
        assert all(each.is_cuda for each in found.values())
    for place, total in on_host(found).items():
        assert torch.equal(total, expected[place])
    assert sum(copy.bytes for copy in sent[TO_HOST]) == 4 * 4 * 60_007
    assert sum(copy.bytes for copy in sent[TO_DEVICE]) == 4 * 60_007
    assert all(copy.pinned for copies in sent.values() for copy in copies)
    assert not device.reads
