"""Refit of left factors to the compressed model's inputs."""
