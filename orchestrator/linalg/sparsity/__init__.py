"""Entries of a matrix to keep: by score, and beside low rank."""
