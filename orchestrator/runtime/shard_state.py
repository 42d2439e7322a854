"""One shard of a pass of chunks."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class ShardState:
    """One shard of a pass."""

    blocks: range
    todo: tuple[int, ...]
    """Blocks whose unit is to be committed."""
    owner: int | None = None
    opened: bool = False
    busy: bool = False
    fed: set[int] = field(default_factory=set)
    """Chunks that have passed since the owner opened the shard."""
    node: str | None = None
    """Node of its present or last owner, where its output is in memory or cached."""
    backward: bool = False
    """True if chunks pass from its last block to its first."""

    @property
    def entry(self) -> int:
        """Input boundary, named by the block that it is the input of."""
        return self.blocks.stop if self.backward else self.blocks.start

    @property
    def exit(self) -> int:
        """Output boundary, named in the same way."""
        return self.blocks.start if self.backward else self.blocks.stop

    @property
    def label(self) -> str:
        first, last = self.blocks[0], self.blocks[-1]
        return f"block {first}" if first == last else f"blocks {first}-{last}"

    def kind(self, *, has_head: bool, scores: bool) -> str:
        """Kind of the steps through it, by what they compute.

        Args:
            has_head: True if it has the last block, whose worker computes logits if they are used.
            scores: True if the pass uses logits.
        """
        if self.backward:
            return "turn" if has_head else "back"
        if self.todo:
            return "gather"
        return "score" if has_head and scores else "forward"
