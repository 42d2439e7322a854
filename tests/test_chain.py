"""The schedule of blocks that wait for each other, as a value; no Ray, no tensors."""

import random

import pytest

from orchestrator.cluster.chain import Chain


def drive(chain, workers=(0, 1), loss=0.0, seed=0):
    """Performs a chain; the calls that ended well, and who made them."""
    rng, workers, done = random.Random(seed), list(workers), []
    for _ in range(1000):
        if chain.finished:
            return done
        (call,) = chain.calls(workers)
        assert chain.calls([w for w in workers if w != call.worker]) == []
        if rng.random() < loss:
            workers.remove(call.worker)
            workers.append(max([*workers, call.worker]) + 1)
            chain.lost(call)
        else:
            done.append((call.method, *call.arguments, call.worker))
            chain.succeeded(call)
    raise AssertionError("the chain does not come to an end")


def test_blocks_are_made_in_order_by_one_worker():
    """One call at a time, from block 0 on, by whoever made the one before."""
    done = drive(Chain(todo=[2, 0, 1], present=[]), workers=[5, 3])
    assert done == [("walk", 0, 3), ("walk", 1, 3), ("walk", 2, 3)]


def test_it_begins_where_the_input_lies_and_ends_behind_the_last():
    """The nearest boundary before the first block to make; made blocks are gone through."""
    for present, first in (([], 0), ([1], 1), ([1, 3], 3), ([1, 4, 5], 1), ([2, 6], 2)):
        done = drive(Chain(todo=[3, 5], present=present))
        expected = [("walk" if b in (3, 5) else "follow", b, 0) for b in range(first, 6)]
        assert done == expected


def test_nothing_to_do_is_finished():
    """A chain whose blocks are all made asks for nothing."""
    chain = Chain(todo=[], present=[4])
    assert chain.finished
    assert chain.calls([0]) == []


@pytest.mark.parametrize("seed", range(20))
def test_losing_workers_loses_one_block_at_a_time(seed):
    """A call whose worker died is made again, by another; nothing before it is."""
    done = drive(Chain(todo=range(6), present=[]), loss=0.4, seed=seed)
    assert [call[:2] for call in done] == [("walk", block) for block in range(6)]


def test_a_missing_input_is_made_again_from_the_models():
    """What was made stays and is gone through."""
    chain = Chain(todo=range(3), present=[])
    chain.succeeded(*chain.calls([0]))
    chain.missing(*chain.calls([0]))
    assert drive(chain) == [("follow", 0, 0), ("walk", 1, 0), ("walk", 2, 0)]
