"""Workers of a compression: open shards, passes through them, and stored tensors by source."""
