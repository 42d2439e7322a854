"""Checkpoints on disk: headers, weights, the layout of files, writing."""
