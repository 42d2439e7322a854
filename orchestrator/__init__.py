"""Compresses large language models on a Ray cluster, by low rank and by low rank + sparse."""

__version__ = "0.1.0"
