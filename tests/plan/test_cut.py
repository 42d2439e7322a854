"""Cuts of a model into shards."""

import pytest

from orchestrator.plan.cut import cut_blocks, default_shards


@pytest.mark.parametrize(("blocks", "shards"), [(30, 16), (30, 4), (7, 7), (3, 10), (80, 1)])
def test_cuts_are_contiguous_and_even(blocks, shards):
    """Cuts cover every block once, in order, and differ by one block at most."""
    cut = cut_blocks(blocks, shards)
    assert [block for part in cut for block in part] == list(range(blocks))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert len(cut) == min(blocks, shards)


def test_cuts_fall_between_groups():
    """Groups counted from block 0 are never split."""
    assert all(part.start % 4 == 0 for part in cut_blocks(30, 5, group=4))
    assert cut_blocks(30, 5, group=4)[-1].stop == 30


def test_default_shards_fill_the_last_wave():
    """At most two blocks a shard, and a multiple of the workers where blocks allow it."""
    assert default_shards(30, 2) == 16
    assert default_shards(30, 1) == 15
    assert default_shards(80, 8) == 40
    assert default_shards(3, 8) == 3
