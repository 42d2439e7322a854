"""Cuts of a model into shards: contiguous blocks that one worker holds at a time."""


def cut_blocks(num_blocks: int, shards: int, group: int = 1) -> tuple[range, ...]:
    """Contiguous cuts whose sizes differ by one group at most, the larger ones first.

    Boundaries fall only between groups of `group` blocks counted from block 0. There are never more
    shards than groups.
    """
    groups = -(-num_blocks // group)
    shards = min(shards, groups)
    small, larger = divmod(groups, shards)
    cuts, start = [], 0
    for index in range(shards):
        stop = start + group * (small + (index < larger))
        cuts.append(range(start, min(stop, num_blocks)))
        start = stop
    return tuple(cuts)


def default_shards(num_blocks: int, workers: int, blocks: int = 2) -> int:
    """The smallest multiple of the workers that leaves at most `blocks` blocks in a shard.

    Two blocks are what a lost worker may cost; a multiple keeps the last wave full.
    """
    least = -(-num_blocks // blocks)
    return min(num_blocks, -(-least // workers) * workers)


def cut_segments(shards: int, workers: int, count: int) -> tuple[range, ...]:
    """Contiguous segments of shards, which a backward pass goes through one by one.

    The forward pass before it leaves chunks where segments meet, and in the last segment at every
    boundary; those within another segment are made from its start when its turn comes. That is one
    more forward pass through all segments but the last: checkpointing by segments (Griewank and
    Walther, 2000; arXiv:1604.06174).

    Later segments are the larger ones; all but the first have a multiple of `workers` shards.
    """
    cut = cut_blocks(shards, count, workers)
    return tuple(range(shards - each.stop, shards - each.start) for each in reversed(cut))
