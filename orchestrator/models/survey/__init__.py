"""Discovery of a model's blocks, linears and names, from config and headers."""
