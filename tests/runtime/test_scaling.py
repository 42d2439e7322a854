"""Number of workers as a function of the request, the room and the work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.runtime.scaling import IDLE_SECONDS, Bounds, to_give_back, wanted

COUNTS = st.integers(0, 100)
ASKED = st.one_of(
    st.none(),
    st.integers(1, 100),
    st.tuples(st.integers(1, 100), st.integers(0, 100)).map(lambda p: f"{p[0]}..{p[0] + p[1]}"),
)

TABLE = {
    "unasked, what there is room for": (None, 40, 8, 8),
    "unasked, what can be used": (None, 3, 8, 3),
    "unasked, on a cluster without a node": (None, 40, 0, 0),
    "so many": (4, 40, 8, 4),
    "so many, kept at the end of a stage": (4, 1, 8, 4),
    "so many, of which a node has gone": (4, 40, 2, 2),
    "more than there is room for": ("2..8", 40, 0, 8),
    "no more than can be used": ("2..8", 5, 0, 5),
    "no fewer than the fewest": ("2..8", 1, 8, 2),
}


@pytest.mark.parametrize("case", TABLE)
def test_how_many_workers_are_wanted(case):
    """The work, the bounds and, unless the pool grows, the room decide."""
    asked, max_workers, room, count = TABLE[case]
    assert wanted(Bounds.of(asked), max_workers, room) == count


@given(ASKED, COUNTS, COUNTS)
def test_bounds_hold(asked, max_workers, room):
    """The number never exceeds the bounds, nor the room unless the pool grows, and is monotonic."""
    bounds = Bounds.of(asked)
    count = wanted(bounds, max_workers, room)
    assert bounds.most is None or count <= bounds.most
    assert count <= max(max_workers, bounds.least)
    assert bounds.is_growing or count <= room
    assert count >= (bounds.least if bounds.is_growing else min(bounds.least, room))
    assert wanted(bounds, max_workers + 1, room) >= count
    assert wanted(bounds, max_workers, room + 1) >= count


@pytest.mark.parametrize("asked", ["0", "3..2", "0..4", "1..", "..4", "x", "1...4", "-1", 0, -3])
def test_what_is_no_number_of_workers_is_refused(asked):
    """The message names the allowed values."""
    with pytest.raises(UsageError, match=r"workers is .*; it must be a number of 1 or above, or M"):
        Bounds.of(asked)


@given(st.dictionaries(st.integers(0, 20), st.floats(0, 100)), st.integers(-5, 25))
def test_the_longest_idle_are_given_back(idle, spare):
    """At most the surplus is given back, only workers idle for long, the longest idle first."""
    gone = to_give_back(idle, spare)
    stay = {worker for worker, seconds in idle.items() if seconds > IDLE_SECONDS} - set(gone)
    assert len(gone) == len(set(gone)) <= max(0, spare)
    assert all(idle[worker] > IDLE_SECONDS for worker in gone)
    assert not stay or len(gone) == max(0, spare)
    assert all(idle[one] >= idle[other] for one in gone for other in stay)
