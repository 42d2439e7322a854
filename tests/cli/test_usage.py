"""Memory of workers: an elementwise maximum that is stored as JSON."""

import itertools

import pytest

from orchestrator.usage import DeviceUsage, Usage

EXAMPLES = [
    Usage(host=5),
    Usage(host=2, device=DeviceUsage(allocated=3, reserved=4, context=9)),
    Usage(host=7, device=DeviceUsage(allocated=8, reserved=9, context=1)),
]


@pytest.mark.parametrize("usage", EXAMPLES)
def test_goes_through_json(usage):
    """The JSON round trip is exact; without a GPU there is no device entry."""
    assert Usage.from_json(usage.to_json()) == usage
    assert ("device" in usage.to_json()) == (usage.device is not None)
    assert Usage.from_json({**usage.to_json(), "forecast": 1}) == usage


def test_merging_is_a_maximum():
    """Merging is commutative, associative, idempotent, and at least each operand."""
    for one, two, three in itertools.product(EXAMPLES, repeat=3):
        assert one.merge(two) == two.merge(one)
        assert one.merge(two).merge(three) == one.merge(two.merge(three))
        assert one.merge(one) == one
        assert one.merge(two).merge(one) == one.merge(two)
    most = EXAMPLES[1].merge(EXAMPLES[2])
    assert most == Usage(host=7, device=DeviceUsage(allocated=8, reserved=9, context=9))
    assert most.device.total == 18


def test_is_read_as_a_line():
    """The text has device and host separately."""
    assert str(EXAMPLES[0]) == "host 5 B"
    assert str(EXAMPLES[2]) == "device 9 B reserved, 8 B allocated, 1 B context; host 7 B"
