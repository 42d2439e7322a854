"""A correction sweep: blocks refined one after the other, each behind the refined ones."""

from collections.abc import Iterator, Sequence

from orchestrator.models.chunk import Chunk
from orchestrator.models.refine import Refined, refine
from orchestrator.models.refine_options import RefineOptions
from orchestrator.models.skeleton import Skeleton


def sweep(
    dense: Skeleton,
    compressed: Skeleton,
    chunks: Sequence[Chunk],
    options: RefineOptions,
    seed: int,
) -> Iterator[Refined]:
    """Refines every block in order, block 0 first, and gives each as soon as it is done.

    A block's inputs are what the refined blocks before it give, its targets what the dense block
    gives on the dense model's own inputs: so it learns to undo their errors too. On blocks that
    were never refined this is AA-SVD's loop (arXiv:2604.02119); on blocks refined apart from each
    other, on dense inputs, it corrects them.

    One block of each model and two streams of chunks are in memory, beside what a `Refinement`
    takes. Nothing is written: `compressed` reads its tensors again the next time.

    Args:
        compressed: Opened in float32.
        chunks: At the model's input.
    """
    targets, inputs = list(chunks), list(chunks)
    for block in range(dense.num_blocks):
        blocks = range(block, block + 1)
        with dense.shard(blocks) as shard:
            targets = [shard.forward(chunk) for chunk in targets]
        with compressed.shard(blocks) as shard:
            refined = refine(shard, inputs, targets, options, seed)
            inputs = [shard.forward(chunk) for chunk in inputs]
        yield refined
