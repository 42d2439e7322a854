"""Compensation and training of blocks in order."""
