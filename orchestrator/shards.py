"""Where a model is cut into shards: contiguous blocks that one worker has at a time."""

from collections.abc import Sequence


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
    """So many contiguous segments of shards, which a backward pass goes through one by one.

    The forward pass before it leaves chunks where segments meet, and in the last segment at every
    boundary; those within another segment are made from its start when its turn comes. So at most
    `kept_boundaries` of them are there at a time, for one more forward pass through all segments
    but the last: checkpointing by segments (Griewank and Walther, 2000; arXiv:1604.06174).

    The last ones are the larger, and all but the first have a multiple of the workers' number.
    """
    cut = cut_blocks(shards, count, workers)
    return tuple(range(shards - each.stop, shards - each.start) for each in reversed(cut))


def kept_boundaries(segments: Sequence[range]) -> int:
    """The most boundaries that wait for a backward pass: before a segment and within it."""
    return max(before + len(each) - 1 for before, each in enumerate(segments))


def segments_within(shards: int, workers: int, boundaries: int | None) -> tuple[range, ...]:
    """The fewest segments that keep chunks at no more boundaries, or at as few as can be."""
    counts = range(1, -(-shards // workers) + 1)
    cuts = [cut_segments(shards, workers, count) for count in counts]
    kept = [kept_boundaries(cut) for cut in cuts]
    most = shards if boundaries is None else max(boundaries, min(kept))
    return next(cut for cut, each in zip(cuts, kept, strict=True) if each <= most)
