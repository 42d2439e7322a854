"""Training of each block towards its dense outputs."""
