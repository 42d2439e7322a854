"""Models loaded block by block, and the chunks of tokens passed through them."""
