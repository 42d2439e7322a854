"""Models that are loaded block by block, and the chunks that pass through them."""
