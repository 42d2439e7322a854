"""Where a model is cut into shards: contiguous blocks that one worker has at a time."""


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
