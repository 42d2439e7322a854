"""Losses of the model with one linear truncated."""
