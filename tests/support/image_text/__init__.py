"""Tiny models that read images, their inputs, and their processors."""
